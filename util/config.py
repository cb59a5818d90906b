"""Facts about the published tokenizer, KL-16, for files that do not describe theirs."""

#: Constructor arguments of the published tokenizer.
KL16_CONFIG = {"embed_dim": 16, "ch_mult": [1, 1, 2, 2, 4]}
#: What its latents are multiplied by.
KL16_LATENT_FACTOR = 0.2325
#: KL-16's channels by share of low-frequency energy, highest first (section 3.2). Published checkpoints do not hold it.
KL16_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
