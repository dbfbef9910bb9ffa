"""Prints the wgmma descriptors that Triton makes of gᵀx, both through TMA, as if each lay at 0.

Exits with 77 where this Triton cannot compile the kernel without a GPU.
"""

import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(g, x, out, len_t, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for t in range(0, len_t, BLOCK_T):
        acc = tl.dot(tl.trans(g.load([t, 0])), x.load([t, 0]), acc)
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, acc)


box = "tensordesc<bf16[64,128]>"
signature = {"g": box, "x": box, "out": "*fp32", "len_t": "i32"}
constants = {"BLOCK_T": 64, "BLOCK": 128}
try:
    source = ASTSource(product, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    target = GPUTarget("cuda", 90, 32)
    made = triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 3})
except (TypeError, KeyError) as error:
    print(f"Triton {triton.__version__} does not compile it so: {error}")
    sys.exit(77)
ptx = made.asm["ptx"]
assert re.search(r"wgmma\.mma_async\S+m64n128k16\S+bf16", ptx)
assert re.search(r"\}, %rd\d+, %rd\d+, %p\d+, 1, 1, 1, 1;", ptx), "both operands transposed"
line = re.compile(r"^\s*([a-z]+)\S*\s+(%r\w+), ([^{}\n]+);", re.MULTILINE)
found: dict[str, list[tuple[str, list[str]]]] = {}
for op, register, inputs in line.findall(ptx):
    found.setdefault(register, []).append((op, inputs.split(", ")))
compute = {
    "mov": lambda a: a, "cvt": lambda a: a, "or": lambda a, b: a | b, "add": lambda a, b: a + b,
    "and": lambda a, b: a & b, "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
    "bfe": lambda a, first, bits: a >> first & (1 << bits) - 1,
}  # fmt: skip


def constant(word: str) -> int:
    """What a register holds if everything that is only known when it runs is 0."""
    if word.lstrip("-").isdigit():
        return int(word)
    if len(found.get(word, ())) != 1:  # a special register, a symbol, or carried by the loop
        return 0
    ((op, inputs),) = found[word]
    return compute[op](*map(constant, inputs)) if op in compute else 0


pairs = re.findall(r"\}, (%rd\d+), (%rd\d+), %p\d+, 1, 1, 1, 1;", ptx)
for words in zip(*pairs, strict=True):
    start = constant(words[0]) & 0x3FFF  # where the operand lies in shared memory
    print(*(constant(word) - start for word in words))
