"""Fails if a search on the site does not find the page with the answer among the first results.

    python docs/check_search.py build/site

Reads the index that the site's search reads in the browser, and ranks pages as it does: by words in
titles, then words in the text; whole words before parts of words. A page has to have all words.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from sphinx.search.en import SearchEnglish

# What readers search for, and the pages that answer. conf.py makes terms of the index of them,
# which come first in the results; but the pages have to have the words themselves.
QUERIES = {
    "apply_rotary_pos_emb": ("coming_from", "guides/transformers"),
    "apply_rotary_emb": ("coming_from", "guides/own_function"),
    "rotate_half": ("coming_from", "rope"),
    "freqs_cis": ("coming_from",),
    "view_as_complex": ("coming_from",),
    "rotary-embedding-torch": ("coming_from",),
    "lucidrains": ("coming_from",),
    "diffusers": ("coming_from",),
    "timm": ("coming_from",),
    "DINOv3": ("coming_from",),
    "nanochat": ("coming_from",),
    "flash_attn rotary": ("coming_from", "guides/integrations"),
    "GPT-J interleaved": ("rope", "coming_from"),
    "rope_theta": ("rope",),
    "LibTorch RoPE": ("guides/libtorch",),
    "C++": ("reference/cpp",),
    "qk norm": ("guides/norms",),
    "RMSNorm": ("guides/norms",),
    "KV cache": ("guides/kv_cache",),
    "cu_seqlens": ("guides/packed",),
    "YaRN": ("guides/long_context",),
    "NTK": ("guides/long_context",),
    "M-RoPE": ("guides/images",),
    "ONNX": ("guides/compile",),
    "AOTInductor": ("guides/compile",),
    "TorchScript": ("guides/libtorch",),
    "FSDP": ("guides/distributed",),
    "CUDA graphs": ("guides/cuda_graphs",),
    "TensorIterator": ("design",),
    "ROPE_CUDA": ("reference/environment", "installation"),
    "expected rotary_dim to be even": ("errors",),
}
FIRST = 6  # results
TITLE, PART_OF_TITLE, TERM, PART_OF_TERM = 15, 7, 5, 2


def pages_of(entry: int | list[int]) -> list[int]:
    """Returns the pages of an entry of the index."""
    return [entry] if isinstance(entry, int) else entry


def scores(index: dict[str, Any], word: str, stem: str) -> dict[int, int]:
    """Returns the pages that have a word, each with its score."""
    found: dict[int, int] = defaultdict(int)
    for terms, whole, part in (
        (index["titleterms"], TITLE, PART_OF_TITLE),
        (index["terms"], TERM, PART_OF_TERM),
    ):
        for term, entry in terms.items():
            lower = term.lower()
            score = whole if lower in (word, stem) else part if word in lower else 0
            for page in pages_of(entry) if score else []:
                found[page] = max(found[page], score)
    return found


def search(index: dict[str, Any], query: str) -> list[tuple[int, str]]:
    """Returns the scores and names of the pages that have all words of a query, best first."""
    language = SearchEnglish({})
    words = [word.lower() for word in language.split(query)]
    words = [word for word in words if word not in language.stopwords]
    by_word = [scores(index, word, language.stem(word)) for word in words]
    pages = set.intersection(*(set(found) for found in by_word))
    results = [(max(found[page] for found in by_word), index["docnames"][page]) for page in pages]
    for title, places in index["alltitles"].items():
        if query.lower() in title.lower() and 2 * len(query) >= len(title):
            score = round(TITLE * len(query) / len(title))
            results += [(TITLE + score, index["docnames"][page]) for page, _ in places]
    return sorted(results, reverse=True)


def main(site: Path) -> int:
    """Prints what is not found; returns the exit status."""
    text = (site / "searchindex.js").read_text()
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    missed = 0
    for query, answers in QUERIES.items():
        results = search(index, query)
        for answer in answers:
            score = max((score for score, page in results if page == answer), default=0)
            before = {page for other, page in results if other > score}
            if not score or len(before) >= FIRST:
                missed += 1
                print(f"{query!r} does not find {answer} among the first: {results[:FIRST]}")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
