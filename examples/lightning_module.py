"""A LightningModule whose network is sparse."""

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedmef_fx
from fedmef_fx.models import digits_cnn


class Classifier(lightning.LightningModule):
    """Any LightningModule; only the network is transformed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,)))
    module = Classifier(fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.2)))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader(data, batch_size=16))
    fedmef_fx.save(module.network, "model.safetensors")
    print(f"density {fedmef_fx.density(module.network):.2f}")
