"""transformers: the Trainer, generation, gradient checkpointing and saving, on tiny random models."""

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import fedmef_fx
from fedmef_fx import Config, Extrusion, freeze, transform
from tests.ecosystem.networks import CONFIG, PACKED, check_same_state, check_sparse

BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    num_labels=3,
)
LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _bert(config: Config = CONFIG) -> Any:
    torch.manual_seed(0)
    return transform(BertForSequenceClassification(BERT), config, example_kwargs=_batch())


def _llama(config: Config = CONFIG) -> Any:
    torch.manual_seed(0)
    ids = _batch()["input_ids"]
    return transform(LlamaForCausalLM(LLAMA), config, example_kwargs={"input_ids": ids, "labels": ids})


def _batch(number: int = 4) -> dict[str, torch.Tensor]:
    rows = _Texts(number)
    return {key: torch.stack([torch.tensor(row[key]) for row in rows]) for key in rows[0]}


class _Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, number: int = 16) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 40, (number, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.ids):
            raise IndexError
        ids = self.ids[index].tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": sum(ids) % 3}


def _trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **(defaults | options),
    )
    return Trainer(model=model, args=arguments, train_dataset=_Texts(), data_collator=_collate)


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def _logits(model: Any) -> torch.Tensor:
    batch = {key: value for key, value in _batch().items() if key != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_trainer(tmp_path: Path, config: Config) -> None:
    model = _bert(config)
    assert isinstance(model, PreTrainedModel)
    result = _trainer(model, tmp_path).train()
    assert result.global_step == 4
    check_sparse(model, expected_density=0.4)
    torch.testing.assert_close(_logits(freeze(model)), _logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["dense", "packed"])
def test_trainer_resumes(tmp_path: Path, config: Config) -> None:
    model = _bert(config)
    _trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    resumed = _bert(config)
    _trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_same_state(resumed, model)
    check_sparse(resumed, expected_density=0.4)


def test_trainer_accumulates_clips_and_evaluates(tmp_path: Path) -> None:
    model = _bert()
    trainer = _trainer(model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5, bf16=True, max_steps=2)
    trainer.train()
    assert "eval_loss" in trainer.evaluate(_Texts(8))
    assert trainer.predict(_Texts(8)).predictions.shape == (8, 3)
    check_sparse(model, expected_density=0.4)


def test_collator_pads_what_the_model_takes() -> None:
    class _Tokenizer:
        padding_side = "right"

        def pad(self, rows: list[dict[str, Any]], **_: Any) -> dict[str, torch.Tensor]:
            longest = max(len(row["input_ids"]) for row in rows)
            return {
                "input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]),
                "attention_mask": torch.tensor(
                    [row["attention_mask"] + [0] * (longest - len(row["attention_mask"])) for row in rows]
                ),
            }

    rows = [{"input_ids": [3, 4, 5], "attention_mask": [1] * 3}, {"input_ids": [6, 7], "attention_mask": [1] * 2}]
    batch = DataCollatorWithPadding(_Tokenizer())(rows)
    model = _bert().eval()
    alone = model(input_ids=torch.tensor([[6, 7]]), attention_mask=torch.tensor([[1, 1]])).logits
    torch.testing.assert_close(model(**batch).logits[1:], alone, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    config = CONFIG.replace(activation_sparsity=0.0)
    plain, ids = _llama(config).train(), _batch()["input_ids"]
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(input_ids=ids, labels=ids).loss.backward()
    for left, right in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-5)


def test_generate_is_the_same_frozen() -> None:
    model = _llama().eval()
    ids = _batch()["input_ids"][:, :4]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    assert expected.shape[1] > 4
    uncached = model.generate(ids, use_cache=False, **options)
    assert torch.equal(expected, uncached)


def test_a_frozen_model_is_saved_and_read_by_transformers_alone(tmp_path: Path) -> None:
    model = _bert().eval()
    plain = BertForSequenceClassification(BERT)
    plain.load_state_dict(fedmef_fx.dense_state_dict(model))
    plain.save_pretrained(str(tmp_path))
    restored = BertForSequenceClassification.from_pretrained(str(tmp_path), local_files_only=True)
    torch.testing.assert_close(_logits(restored), _logits(model), rtol=1e-4, atol=1e-5)


def test_extrusion_with_the_trainers_optimizer(tmp_path: Path) -> None:
    model = _bert()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    trainer = _trainer(model, tmp_path)
    trainer.optimizer = optimizer
    with Extrusion(model, optimizer, budget_steps=4) as extrusion:
        trainer.train()
    assert extrusion.step == 4
    check_sparse(model, expected_density=0.4)


GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
T5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)


@pytest.mark.parametrize(
    ("make", "config", "number"),
    [(GPT2LMHeadModel, GPT2, 4), (LlamaForCausalLM, LLAMA, 4), (T5ForConditionalGeneration, T5, 4)],
    ids=["gpt2", "llama", "t5"],
)
def test_models_with_caches_are_exported(tmp_path: Path, make: Any, config: Any, number: int) -> None:
    ids = _batch()["input_ids"]
    arguments = {"input_ids": ids}
    if make is T5ForConditionalGeneration:
        arguments["decoder_input_ids"] = ids[:, :5].clone()
    options: dict[str, Any] = {"example_inputs": (), "example_kwargs": arguments}
    torch.manual_seed(0)
    model = transform(make(config), CONFIG, example_kwargs=arguments).eval()
    report = fedmef_fx.export_onnx(model, tmp_path / "m.onnx", **options)
    assert report.parity is not None
    assert report.parity.max_rel < 1e-5
    (cache,) = [notice.split()[2].rstrip(",") for notice in report.notices if notice.startswith("left out")]
    fedmef_fx.export_onnx(model, tmp_path / "m.onnx", outputs=["logits", cache], **options)
    written = [value.name for value in onnxruntime.InferenceSession(tmp_path / "m.onnx").get_outputs()]
    assert written[0] == "logits"
    assert len([name for name in written if name.startswith(cache)]) == number


def test_tied_embeddings_stay_tied() -> None:
    config = copy.deepcopy(LLAMA)
    config.tie_word_embeddings = True
    ids = _batch()["input_ids"]
    model: Any = transform(LlamaForCausalLM(config), CONFIG, example_kwargs={"input_ids": ids, "labels": ids})
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert isinstance(model, nn.Module)
    check_sparse(model)
