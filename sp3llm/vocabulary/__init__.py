"""A model's vocabulary and tokenizer restricted to some of its tokens.

Which tokens stay follows from text and from what the tokenizer needs to reach them; a restricted
tokenizer encodes text whose tokens are all kept as it did, and any other text as the same text.
"""
