"""Worker for another Python with another transformers: ``python with_transformers.py FOLDER TEXT...``.

Prints JSON: version, ids and logits of each text, and what loading complained about. Imports nothing of the project.
"""

import json
import logging
import sys

import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline


def main() -> None:
    """Load a folder and run the texts through it."""
    folder, *texts = sys.argv[1:]
    complaints: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.get_logger("transformers").addHandler(handler)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    inputs = [tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        logits = [model(**one).logits[0].tolist() for one in inputs]
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"MKT{tokenizer.mask_token}YIAKQR")
    found = {"version": transformers.__version__, "class": type(model).__name__, "logits": logits}
    found |= {"ids": [one.input_ids[0].tolist() for one in inputs], "complaints": complaints}
    print(json.dumps(found | {"filled": [answer["token_str"] for answer in answers]}))


if __name__ == "__main__":
    main()
