"""A byte-level tokenizer made here, so that text goes in and out with no download.

Token `b` is byte `b` (0 to 255); special tokens follow. A prompt of n ASCII
characters is n tokens, which makes workloads of exact lengths easy to write.
Text that spells out a special token is read as that token; all other UTF-8
text survives encoding and decoding unchanged.
"""

from __future__ import annotations

import json

BYTE_TOKENS = 256
END_TOKEN = "<|shaper_end|>"
SYSTEM_TOKEN = "<|shaper_system|>"
USER_TOKEN = "<|shaper_user|>"
ASSISTANT_TOKEN = "<|shaper_assistant|>"
TOOL_TOKEN = "<|shaper_tool|>"
SPECIAL_TOKENS = (END_TOKEN, SYSTEM_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, TOOL_TOKEN)
END_TOKEN_ID = BYTE_TOKENS
VOCABULARY_SIZE = BYTE_TOKENS + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|shaper_tool|>' + (tools | tojson) + '<|shaper_end|>' }}{% endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|shaper_' + (message['role'] if message['role'] in ['system', 'user', 'assistant',"
    " 'tool'] else 'user') + '|>' }}"
    "{{ message['content'] or '' }}"
    "{{ '<|shaper_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|shaper_assistant|>' }}{% endif -%}"
)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Bytes that print as themselves in Latin-1 keep their character; the others
    take the code points from 256 up, in order (the convention of byte-level
    BPE, which the `ByteLevel` pre-tokenizer and decoder implement).
    """
    keeps = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters = []
    moved = 0
    for byte in range(BYTE_TOKENS):
        if byte in keeps:
            characters.append(chr(byte))
        else:
            characters.append(chr(BYTE_TOKENS + moved))
            moved += 1
    return characters


def tokenizer_json() -> str:
    """The contents of `tokenizer.json`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return str(tokenizer.to_str())


def tokenizer_files() -> dict[str, str]:
    """File name to contents of everything that a tokenizer directory needs."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
