"""A small vocabulary of YouTokenToMe, and the ids that its own code (version 1.0.6) gives for some captions."""

LETTERS = "\u2581абвгд"
MERGES = ((4, 5, 10), (10, 6, 11), (7, 8, 12), (4, 7, 13), (13, 8, 14), (5, 6, 15))  # 16 ids
CAPTIONS = {
    "аб вг": [11, 4, 12],
    "аабб": [10, 15, 6],
    "  вгвг\tдд ": [4, 12, 12, 4, 9, 9],
    "жжа ж": [4, 1, 5, 4, 1],
    "аб\u2581вг": [11, 4, 12],
    "ж": [4, 1],
    "абабаб вгд": [11, 15, 15, 4, 12, 9],
    "а\u00a0б": [10, 1, 6],
}


def vocabulary_of(merges=MERGES, letters=LETTERS, special="1 0 2 3"):
    """Returns the file of a vocabulary."""
    rows = [f"{ord(letter)} {4 + i}" for i, letter in enumerate(letters)]
    rules = [" ".join(map(str, rule)) for rule in merges]
    return "\n".join([f"{len(rows)} {len(rules)}", *rows, *rules, f"{special}\n"])
