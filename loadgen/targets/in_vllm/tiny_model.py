"""Writes the directory of a very small Llama: a configuration and a tokenizer, no weights.

Run as a script by the interpreter that has vLLM, because `tokenizers` lives there and not here:
`python tiny_model.py DIR`.
vLLM fills the weights with noise (`--load-format dummy`), so replies are nonsense, but
scheduling, paging, batching, streaming and the counters are those of any real model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1  # part of the cache folder's name: raise it whenever what is written changes
MAX_POSITIONS = 32_768  # tokens; the longest --max-model-len that the model can be served with
VOCABULARY = 8_000
END = "<|end|>"
SPECIAL = [END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAINING_BYTES = 4_000_000  # enough for 8,000 merges, trained in about two seconds

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# What `save_pretrained` would write, under the class name that old and new transformers know.
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "pad_token": END,
    "model_max_length": MAX_POSITIONS,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def training_text() -> Iterator[str]:
    """The standard library's own sources, in a fixed order: prose and code that is always there."""
    left = TRAINING_BYTES
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text("utf-8", errors="replace")[:left]
        left -= len(text)
        yield text
        if left <= 0:
            return


def train_tokenizer() -> Any:
    """A byte-level BPE tokenizer: any text has an encoding, and decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return tokenizer


def write_model(folder: Path) -> None:
    """Writes the files into `folder`, which exists."""
    train_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0}),
        ("config.json", CONFIG),
    ):
        (folder / name).write_text(json.dumps(content, indent=2), "utf-8")


def make(folder: Path) -> None:
    """Makes `folder` unless it is there: beside it, then renamed, so that it is whole or absent."""
    if (folder / "config.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        write_model(draft)
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError:
        # Another process may have made it meanwhile: the rename onto a full folder fails then.
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
