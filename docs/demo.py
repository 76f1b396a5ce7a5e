"""`make demo`: the README's one-liners on the embedded model, offline, from this checkout."""

from pathlib import Path

import torch

HERE = str(Path(__file__).resolve().parent.parent)

tokenizer = torch.hub.load(HERE, "bertTokenizer", "bert-nano", source="local")
model = torch.hub.load(HERE, "bertForMaskedLM", "bert-nano", source="local")
print(model.provenance)

for text in ("the ship sailed across the [MASK] .", "he took his hat and [MASK] the room ."):
    inputs = tokenizer(text)
    logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
    likely = logits.softmax(-1).topk(5)
    words = zip(tokenizer.tokens(likely.indices[0]), likely.values[0].tolist(), strict=True)
    print(f"\n{text}")
    for word, probability in words:
        print(f"  {word:<12} {probability:.3f}")

tokenizer = torch.hub.load(HERE, "gptTokenizer", "gpt-nano", source="local")
model = torch.hub.load(HERE, "gpt", "gpt-nano", source="local")
print(f"\n{model.provenance}\n")

prompt = tokenizer("The captain looked at the sea, and")
added = model.generate(**prompt, max_new_tokens=40, temperature=0.8, seed=1)[0].ids
print(tokenizer.decode([*prompt["input_ids"][0], *added]))
