"""Modules that were moved: importing one by its old name gives its names, with a warning that says where they are now.

Programs that import them and pickles of models that name them go on working. The table is only asked for names that no
file provides, so it costs nothing where it is not needed.
"""

import importlib
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any, Final

__all__ = ["MOVED", "MovedModules", "keep_old_attributes"]

_PACKAGE: Final = "fedmef_fx"

MOVED: Final[dict[str, str]] = {
    "api": "transformation.transform transformation.recipe transformation.late_capture",
    "atomic": "files.atomic",
    "capture.duplicate": "module_tree",
    "capture.on_values": "capture.per_call",
    "capture.values": "capture.proxies",
    "checkpoint_file": "files.checkpoint_file",
    "clipping": "training.clipping",
    "commands.models": "commands.arguments",
    "compiled": "graph.compiled",
    "demo": "federated.demo",
    "emit": "graph.emit graph.dispatch",
    "export.codecs": "export.onnx.codecs",
    "export.codecs.exponents": "export.onnx.codecs.exponents",
    "export.codecs.fields": "export.onnx.codecs.fields",
    "export.codecs.positions": "export.onnx.codecs.positions",
    "export.codecs.tensor": "export.onnx.codecs.tensor",
    "export.codecs.values": "export.onnx.codecs.values",
    "export.compact_report": "export.compact.report",
    "export.digest": "export.onnx.digest",
    "export.encode": "export.onnx.encode",
    "export.file_records": "export.onnx.file_records",
    "export.inspect_file": "export.onnx.inspect_file",
    "export.manifest": "export.onnx.manifest",
    "export.onnx_file": "export.onnx.onnx_file",
    "export.quantize_int8": "export.onnx.quantize_int8",
    "export.report": "export.onnx.report",
    "extrusion": "training.extrusion",
    "federated.container": "files.container",
    "fresh_process": "measure.fresh_process",
    "gradient_masks": "sparse_model.gradient_masks",
    "growth": "training.growth",
    "inspection.graph_text": "graph.text",
    "inspection.pass_observer": "transformation.observer",
    "inspection.records": "graph.recording records.graphs",
    "inspection.text_table": "display.text_table",
    "layer_marks": "measure.layer_marks graph.origin",
    "layer_sparsity": "budget.layer_sparsity",
    "masked": "sparse_model.masked_parameter",
    "memory": "packing measure.live measure.meter",
    "memory.allocator": "measure.allocator",
    "memory.backend_meta": "packing.backend_meta",
    "memory.backend_numpy": "packing.backend_numpy",
    "memory.backend_torch": "packing.backend_torch",
    "memory.backends": "packing.backends",
    "memory.bitmap": "packing.bitmap",
    "memory.blockwise": "packing.blockwise",
    "memory.codecs": "packing.codecs",
    "memory.gradient_bits": "packing.gradient_bits",
    "memory.layout": "packing.layout",
    "memory.live": "measure.live",
    "memory.meter": "measure.meter",
    "memory.packed": "packing.packed",
    "memory.plan": "budget.plan records.memory_plan display.sizes",
    "memory.plotting": "measure.plotting",
    "memory.registry": "packing.registry",
    "memory.report": "measure.report",
    "memory.resident": "measure.resident",
    "memory.threshold": "packing.threshold",
    "memory.timeline": "measure.timeline",
    "memory.words": "packing.words",
    "memory_report": "measure.memory",
    "micro_batches": "training.micro_batches",
    "model": (
        "sparse_model.transformation sparse_model.masks sparse_model.parameters sparse_model.channels "
        "sparse_model.masked_parameter config"
    ),
    "notebook": "display.notebook",
    "ops.activations": "ops.relu",
    "ops.growth": "ops.gradient_collector",
    "ops.packing": "ops.pack_activation",
    "pipeline": "graph.pipeline records.passes",
    "planned_model": "budget.trial",
    "planner": "budget.planner",
    "plot_style": "display.plot_style",
    "printable": "display.printable",
    "program": "graph.program graph.origin records.graphs module_tree",
    "signature": "graph.signature",
    "source_names": "display.source_names",
    "sparsity.optimizer_state": "sparse_model.optimizer_state",
    "state_dicts": "sparse_model.state_dicts",
    "training_step": "measure.training_step",
    "transformers": "models.transformers",
    "units": "training.adjustment",
    "verify": "graph.verify",
}
"""Old name in the package -> where its names are now, separated by spaces."""

RENAMED: Final[dict[str, str]] = {
    "Call": "ExampleCall",
    "ChannelFact": "WeightChannels",
    "HOLDER": "CHILD_NAME",
    "Layout": "MemoryLayout",
    "Move": "StateUpdate",
    "Operation": "NodeKind",
    "StoredTensor": "ManifestTensor",
    "move_state": "update_state",
    "offer": "add_candidates",
    "silence_channels": "zero_dead_channels",
    "value_of": "concrete_value",
}
"""Names in moved modules -> what they are called now; pickles of models hold some of them."""


class MovedModules(MetaPathFinder):
    """Finds modules by the names that they had."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old name, None for any other."""
        del path, target
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        is_package = any(other.startswith(f"{name}.") for other in MOVED)
        return ModuleSpec(fullname, _Forwarding(_new_names(name)), is_package=is_package)


def _new_names(name: str) -> list[str]:
    return [f"{_PACKAGE}.{new}" for new in MOVED[name].split()]


class _Forwarding(Loader):
    """Loads a module that has no code of its own."""

    def __init__(self, new_names: list[str]) -> None:
        self._new_names = new_names

    def create_module(self, spec: ModuleSpec) -> Any:
        """The module, which looks its names up where they are now."""
        warnings.warn(
            f"{spec.name} has moved; import from {' or '.join(self._new_names)}", DeprecationWarning, stacklevel=2
        )
        package, _, name = spec.name.partition(".")
        # The public function of that name stays what `fedmef_fx.<name>` is: importing a module sets that attribute.
        return getattr(sys.modules[package], name, None) or _Moved(spec.name, self._new_names)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""

    def get_code(self, fullname: str) -> types.CodeType:
        """What `python -m` runs: the module at its new place."""
        source = f"import runpy\nrunpy.run_module({self._new_names[0]!r}, run_name='__main__', alter_sys=True)\n"
        return compile(source, fullname, "exec")


class _Moved(types.ModuleType):
    """A module under its old name."""

    def __init__(self, name: str, new_names: list[str]) -> None:
        super().__init__(name)
        self.__dict__["_new_names"] = new_names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for new_name in self.__dict__["_new_names"]:
            module = importlib.import_module(new_name)
            for each in (name, RENAMED.get(name, name)):
                if hasattr(module, each):
                    return getattr(module, each)
        raise AttributeError(
            f"{self.__name__} has moved to {', '.join(self.__dict__['_new_names'])}; none has {name!r}"
        )


def keep_old_attributes(function: Callable[..., Any]) -> None:
    """Let a public function that shared its name with a module keep the attributes of that module."""
    for new_name in _new_names(function.__name__):
        module = importlib.import_module(new_name)
        for name in module.__all__:
            setattr(function, name, getattr(module, name))
        for old, new in RENAMED.items():
            if new in module.__all__:
                setattr(function, old, getattr(module, new))
