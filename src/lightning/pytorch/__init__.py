"""The separate package ``pytorch_lightning`` under the name ``lightning.pytorch``, where it is installed."""

import importlib.util

from lightning._alias import serve

if importlib.util.find_spec("pytorch_lightning") is None:
    raise ModuleNotFoundError(
        "lightning.pytorch (Trainer, LightningModule, LightningDataModule, Callback) is served from the separate"
        " package pytorch_lightning, which is not installed: pip install pytorch-lightning",
        name="pytorch_lightning",
    )
serve(__name__, "pytorch_lightning")
