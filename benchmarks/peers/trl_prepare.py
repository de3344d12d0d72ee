"""Tokenise conversations as TRL's SFTTrainer does: `datasets.map` over `apply_chat_template`.

    python benchmarks/peers/trl_prepare.py DATA.jsonl TOKENIZER PROCESSES

DATA.jsonl holds `messages`. The template is ChatML with the generation tags that TRL needs for
`assistant_only_loss`. Needs transformers and datasets alone. Prints one JSON line.
"""

import json
import os
import sys
import time

from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import AutoTokenizer

TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def main() -> None:
    data, directory, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    disable_caching()
    disable_progress_bars()

    def tokenise(record: dict) -> dict:
        encoded = tokenizer.apply_chat_template(
            record["messages"],
            chat_template=TAGGED,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    with open(data) as file:
        dataset = Dataset.from_list([json.loads(line) for line in file])
    started, busy = time.perf_counter(), cpu_seconds()
    made = dataset.map(tokenise, num_proc=processes, remove_columns=dataset.column_names)
    seconds = time.perf_counter() - started
    tokens = sum(map(len, made["input_ids"]))
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu": cpu_seconds() - busy}))


def cpu_seconds() -> float:
    """Processor time of this process and of those that it has ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
