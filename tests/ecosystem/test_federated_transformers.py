"""Federations of transformers: batches with attention masks and labels, outputs that hold the model's own loss."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedmef_fx import Config
from fedmef_fx.federated import History, LocalTraining, run
from fedmef_fx.federated.state import read_state

transformers = pytest.importorskip("transformers")

CONFIG = Config(density=0.5, adjustment_interval=1)
TRAINING = LocalTraining(epochs=2, batch_size=8, optimizer="adam", learning_rate=3e-3)
LENGTH, WORDS = 10, 40


class _Sentences(Dataset[Any]):
    """Sentences that are about one of two words; what stands behind their end is padding."""

    def __init__(self, samples: int, *, seed: int, padding: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(2, (samples,), generator=generator)
        self.words = torch.randint(4, WORDS, (samples, LENGTH), generator=generator)
        self.words[:, 0] = 1 + self.labels
        lengths = torch.randint(3, LENGTH, (samples, 1), generator=generator)
        self.mask = (torch.arange(LENGTH) < lengths).long()
        self.words[self.mask == 0] = padding

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.words[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
            "index": torch.tensor(index),
        }


def _bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=WORDS, num_labels=2, max_position_embeddings=LENGTH, **sizes)
    )


def _play(model: Any, *, padding: int = 0, **options: Any) -> History:
    clients = [_Sentences(24, seed=seed, padding=padding) for seed in range(2)]
    test = _Sentences(64, seed=9, padding=padding)
    return run(model, clients, CONFIG, **{"rounds": 2, "training": TRAINING, "test": test, **options})


def test_a_classifier_with_an_attention_mask() -> None:
    history, other = _play(_bert(), rounds=3), _play(_bert(), rounds=3, padding=7)
    assert not history.failures
    assert (history.test_accuracy or 0.0) > 0.8
    assert [record.adjusted for record in history.rounds] == [False, True, True]
    # What is behind the end of a sentence makes no difference, as its mask is passed on.
    assert history.model is not None
    assert other.model is not None
    found, expected = read_state(history.model, version=0), read_state(other.model, version=0)
    for name, values in found.values.items():
        # Attention to padding is exp(-huge), not 0 to the bit, in some kernels.
        assert torch.allclose(values, expected.values[name], atol=1e-4)


def test_tokenized_batches_of_a_collator() -> None:
    def collate(items: list[dict[str, Tensor]]) -> Any:
        return transformers.BatchEncoding({name: torch.stack([i[name] for i in items]) for name in items[0]})

    history, plain = _play(_bert(), collate_fn=collate), _play(_bert())
    assert not history.failures
    assert [record.train_loss for record in history.rounds] == [record.train_loss for record in plain.rounds]


def test_the_models_own_loss_is_taken() -> None:
    class _Letters(Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            ids = (torch.arange(LENGTH) + index) % WORDS
            return {"input_ids": ids, "labels": ids}  # the model shifts them

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
    config = transformers.GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **sizes)
    history = run(
        transformers.GPT2LMHeadModel(config), [_Letters()], CONFIG, rounds=4, training=TRAINING, test=_Letters()
    )
    assert not history.failures
    first, last = history.rounds[0], history.rounds[-1]
    assert (last.test_loss or 9.0) < (first.test_loss or 0.0)
    assert last.test_accuracy is None  # positions do not predict their own letter
