"""The package ``lightning.fabric`` under its other name: every module here is the module there."""

from lightning._alias import serve

serve(__name__, "lightning.fabric")
