"""What engines are asked in tests."""

import random


def workload(
    seed: int, groups: int = 3, each: int = 4, shared: tuple[int, int] = (600, 1200)
) -> list[list[int]]:
    """Prompts, of which `each` share what they begin with: that many tokens, at least and at most."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(16, 2000) for _ in range(count)]

    prompts = []
    for _ in range(groups):
        common = [1, *words(rng.randrange(*shared))]
        prompts += [common + words(rng.randrange(40, 300)) for _ in range(each)]
    return prompts


def whole(prompts: list[list[int]], size: int) -> int:
    """Tokens of all whole blocks of that size, but for the last token of each prompt."""
    return sum((len(prompt) - 1) // size * size for prompt in prompts)
