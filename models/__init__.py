"""The mathematics of TokenBridge: tokenizer, quantizer, backbone, channel head, sampling."""
