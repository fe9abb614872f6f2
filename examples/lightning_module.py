"""PyTorch Lightning: a meta-batch of tasks is a batch, and the module's training step adapts to all of them.

Run: python examples/lightning_module.py    (needs the package lightning)
"""

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lambda_maml import adapt_tasks, data, models

INNER = {"pattern": "11111", "steps": 1, "lr": 0.4}


class FewShot(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = models.conv4(ways=5, in_channels=1, width=16, image_size=28)

    def training_step(self, batch, index):
        xs, ys, xq, yq = batch  # [8, 5, 1, 28, 28], [8, 5], [8, 25, 1, 28, 28], [8, 25]
        logits = adapt_tasks(self.model, xs, ys, xq, second_order=True, **INNER)
        return F.cross_entropy(logits.flatten(0, 1), yq.flatten())

    def validation_step(self, batch, index):
        xs, ys, xq, yq = batch
        with torch.enable_grad():  # Lightning turns gradients off, adaptation needs them
            logits = adapt_tasks(self.model, xs, ys, xq, **INNER)
        self.log("accuracy", (logits.argmax(-1) == yq).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def batches(split: str, tasks: int) -> DataLoader:
    return DataLoader(
        data.sample_tasks(data.load("glyphs", split=split), tasks, ways=5, shots=1, query=5), batch_size=8
    )


if __name__ == "__main__":
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(FewShot(), batches("train", 160), batches("val", 40))
    print(f"accuracy on new tasks: {trainer.callback_metrics['accuracy']:.1%}")
