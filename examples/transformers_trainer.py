"""The Trainer of transformers with a sparse text classifier."""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fedmef_fx

torch.manual_seed(0)


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Token ids and labels; a tokenized data set of your own takes its place."""

    def __init__(self) -> None:
        self.ids, self.labels = torch.randint(1, 100, (64, 12)), torch.randint(0, 2, (64,))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


small = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
)
texts = Texts()
example = {"input_ids": texts.ids[:8], "labels": texts.labels[:8]}  # as the Trainer calls it
model = fedmef_fx.transform(BertForSequenceClassification(small), fedmef_fx.Config(density=0.2), example_kwargs=example)
arguments = TrainingArguments(
    output_dir="run", max_steps=4, per_device_train_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True
)
Trainer(model=model, args=arguments, train_dataset=texts).train()

fedmef_fx.save(model, "model.safetensors")
print(f"density {fedmef_fx.density(model):.2f}")
