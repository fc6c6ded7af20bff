# SPDX-License-Identifier: Apache-2.0
"""Loops of machine code, found from its branches: how many instructions one round of a kernel's
inner loop has."""

import re
from collections import defaultdict

from cuda_build import opcode

# Instructions that name where they may continue; BSYNC continues where its BSSY said.
_JUMP = re.compile(r"\b(?:BRA|BSSY|BRX|JMP)\b.*?0x([0-9a-f]+)")
# After these, the next instruction is not reached.
_END = re.compile(r"(BRA|JMP) 0x|EXIT\b|RET\b|BRX\b")


def blocks_of(code):
    """Basic blocks as lists of positions in `code`, and the blocks that may follow each."""
    at = {address: position for position, (address, _) in enumerate(code)}
    jumps = {}
    for position, (_, text) in enumerate(code):
        target = _JUMP.search(text)
        if target and int(target[1], 16) in at:
            jumps[position] = at[int(target[1], 16)]
    leaders = {0, *jumps.values()}
    leaders |= {i + 1 for i, (_, text) in enumerate(code) if i in jumps or _END.match(text)}
    starts = sorted(leaders - {len(code)})
    blocks = [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {block[0]: i for i, block in enumerate(blocks)}
    successors = []
    for i, block in enumerate(blocks):
        last = block[-1]
        following = {number[jumps[last]]} if last in jumps else set()
        if not _END.match(code[last][1]) and i + 1 < len(blocks):
            following.add(i + 1)
        successors.append(following)
    return blocks, successors


def dominators(successors):
    """For each block those that every way from the first one passes; None where there is no way."""
    predecessors = defaultdict(set)
    for block, following in enumerate(successors):
        for other in following:
            predecessors[other].add(block)
    found = [None] * len(successors)
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            ways = [found[other] for other in predecessors[block] if found[other] is not None]
            if ways and (through := set.intersection(*ways) | {block}) != found[block]:
                found[block], changed = through, True
    return found, predecessors


def loops(code):
    """Every loop as the set of positions in it; loops with one header count as one."""
    blocks, successors = blocks_of(code)
    dominate, predecessors = dominators(successors)
    bodies = defaultdict(set)
    for block, following in enumerate(successors):
        for header in following:
            if dominate[block] is None or header not in dominate[block]:
                continue
            body, waiting = {header}, [block]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += predecessors[inside]
            bodies[header] |= body
    return [{i for block in body for i in blocks[block]} for body in bodies.values()]


def product_loops(code):
    """(instructions, tensor-core products) of each innermost loop that has products."""
    products = {i for i, (_, text) in enumerate(code) if opcode(text).startswith("HMMA")}
    having = [body for body in loops(code) if body & products]
    inner = [body for body in having if not any(other < body for other in having)]
    return sorted((len(body), len(body & products)) for body in inner)
