"""The metrics."""
import numpy as np
import tinygrad_lite
import data

CHUNK = 256  # prompts decoded together

def sample(model, targets, temperature, rng, map_fn=map):
    """One answer for each target, as text: `100=10+70+20`."""
    chunks = [targets[i:i + CHUNK] for i in range(0, len(targets), CHUNK)]
    def answers(chunk):
        targets, rng = chunk
        prompts = [data.prompt(target) for target in targets]
        room = data.MAX_LEN - 4
        new = model.generate(prompts, room, temperature, rng, end=data.END)
        return [data.decode(p + n) if n and n[-1] == data.END else data.decode(p + n) + "…" for p, n in zip(prompts, new)]
    return [a for part in map_fn(answers, list(zip(chunks, rng.spawn(len(chunks))))) for a in part]

def metrics(answers, preferred=3):
    parsed = [data.parse(a) for a in answers]
    whole = [p for p in parsed if p]
    errors = [abs(sum(terms) - t) for t, terms in whole]
    counts = np.bincount([len(terms) for _, terms in whole], minlength=6)
    n = len(answers)
    return dict(n=n, mean_abs_error=float(np.mean(errors)) if errors else None, exact=sum(e == 0 for e in errors)/n,
        format=len(whole)/n, preferred=float(counts[preferred]/n), counts=counts.tolist())
