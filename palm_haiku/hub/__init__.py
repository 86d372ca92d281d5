"""Public models with PaLM's parallel block, in the layout of the Hugging Face hub."""

from palm_haiku.hub.errors import HubError
from palm_haiku.hub.load import is_model, load, read_config
from palm_haiku.hub.save import save

__all__ = ["HubError", "is_model", "load", "read_config", "save"]
