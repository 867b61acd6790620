"""Texts with known near-duplicates, and their similarity counted by hand."""

import hashlib
import json
import random
import re


def words(random_, count, vocabulary=4000):
    return [f"word{int(random_.paretovariate(0.7)) % vocabulary}" for _ in range(count)]


def edited(random_, text, share):
    """Some words replaced, left out or doubled."""
    out = []
    for word in text:
        draw = random_.random()
        if draw < share / 2:
            out.append(f"x{random_.randrange(10**6)}")
        elif draw < share * 3 / 4:
            out += [word, word]
        elif draw >= share:
            out.append(word)
    return out or text


def planted(clusters=60, alone=200, seed=0):
    """(texts, cluster of each): clusters of 2 to 5 versions of a text, and texts of their own, in random order."""
    draw = random.Random(seed)
    made = []
    for cluster in range(clusters):
        text = words(draw, draw.choice([30, 80, 300]))
        made += [(edited(draw, text, draw.uniform(0, 0.04)) if i else text, cluster) for i in range(draw.randrange(2, 6))]
    made += [(words(draw, draw.choice([30, 80, 300])), clusters + i) for i in range(alone)]
    draw.shuffle(made)
    return [" ".join(text).capitalize() + "." for text, _ in made], [cluster for _, cluster in made]


def grams(text, n=5):
    found = re.findall(r"[^\W_]+", text.lower())
    return {tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))} if found else set()


def jaccard(one, other, n=5):
    a, b = grams(one, n), grams(other, n)
    return len(a & b) / len(a | b) if a | b else 0.0


def jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def digests(folder):
    """Of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
