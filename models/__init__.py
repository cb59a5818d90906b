"""The mathematics of TokenBridge: tokenizer, quantizer, backbone, channel head, sampling."""

import models.location  # noqa: F401, before all other modules
