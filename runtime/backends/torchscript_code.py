"""What a TorchScript module may do, read before torch runs any of it: a module is a program.

An archive is a zip file of code, constants and pickles. The code of kvx's own exports is one class with one method, a
list of assignments from calls of a few operators. Anything else is refused, also what would be harmless.
"""

from __future__ import annotations

import ast
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kvx.runtime.errors import BundleError

OPERATORS = frozenset(
    {
        *("add", "arange", "bitwise_not", "div", "embedding", "flatten", "index_put_", "le", "linear", "lt"),
        *("masked_fill", "matmul", "mean", "mul", "pow", "relu", "reshape", "select", "size", "slice", "softmax"),
        *("std", "sub", "to", "transpose", "unflatten", "unsqueeze"),
    }
)
CALLS = frozenset({*(f"torch.{name}" for name in OPERATORS), "torch.device", "ops.prim.NumToTensor", "annotate"})
STATEMENTS = (ast.Assign, ast.Return)
EXPRESSIONS = (
    *(ast.Attribute, ast.Call, ast.Constant, ast.List, ast.Load, ast.Name, ast.Store, ast.Subscript, ast.Tuple),
    *(ast.UnaryOp, ast.USub, ast.keyword),
)
CHARACTERS = re.compile(r'[\w ".,:=>()\[\]\n-]*', re.ASCII)  # no comments, no escapes: torch and Python read the same
ENTRY = re.compile(
    r"[^/]+/(constants/\d+|data/\d+|constants\.pkl|data\.pkl|version|byteorder|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment|code/[\w/]+\.py|code/[\w/]+\.py\.debug_pkl)",
    re.ASCII,
)
GLOBALS = re.compile(
    r"torch\._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict"
    r"|__torch__\.[\w.]+ (EncoderGraph|StepGraph)",
    re.ASCII,
)
MOST_CODE = 2**22  # bytes
MOST_PICKLE = 2**24


def check_module(path: Path) -> None:
    """Raises BundleError where a module holds anything but what kvx exports."""
    try:
        with zipfile.ZipFile(path) as archive:
            problems = list(_problems(archive))
    except (zipfile.BadZipFile, OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        problems = [f"cannot be read ({error})"]
    if problems:
        raise BundleError(
            f"{path.name} {problems[0]}",
            expected="a TorchScript module that kvx export wrote, with no more than its operators",
            remedy="Do not use this bundle with `backend` torchscript: its modules are programs, and may be hostile.",
        )


def _problems(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    if len(set(names)) < len(names):
        yield "holds two files of one name"
    if len({name.split("/")[0] for name in names}) != 1:
        yield "holds more than one folder"
    yield from (f"holds the file {name!r}" for name in names if not ENTRY.fullmatch(name))
    code = [name for name in names if name.endswith(".py")]
    if len(code) != 1:
        yield f"has {len(code)} files of code"
    for name in code:
        yield from _problems_of_code(_read(archive, name, MOST_CODE).decode("ascii"))
    for name in names:
        if name.endswith(".pkl"):
            yield from _problems_of_pickle(_read(archive, name, MOST_PICKLE))


def _read(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    if archive.getinfo(name).file_size > most:
        raise ValueError(f"{name} has more than {most} bytes")
    return archive.read(name)


def _problems_of_code(code: str) -> Iterator[str]:
    if not CHARACTERS.fullmatch(code):
        yield "has characters in its code that no export has"
        return
    match ast.parse(code).body:
        case [
            ast.ClassDef(
                decorator_list=[], body=[*constants, ast.FunctionDef(name="forward", decorator_list=[]) as forward]
            )
        ]:
            for statement in constants:
                if not _is_constant(statement):
                    yield f"has {ast.unparse(statement)[:80]!r} in its class"
            yield from _problems_of_body(forward)
        case _:
            yield "is not one class with one method, forward"


def _is_constant(statement: ast.stmt) -> bool:
    """Such as __parameters__ = []."""
    return isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List) and not statement.value.elts


def _problems_of_body(forward: ast.FunctionDef) -> Iterator[str]:
    for statement in forward.body:
        if not isinstance(statement, STATEMENTS):
            yield f"has the statement {type(statement).__name__}"
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and ast.unparse(node.func) not in CALLS:
                yield f"calls {ast.unparse(node.func)[:80]}"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != "cpu":
                yield f"names {node.value[:80]!r}"
            elif not isinstance(node, (*STATEMENTS, *EXPRESSIONS)):
                yield f"has the expression {type(node).__name__}"


def _problems_of_pickle(content: bytes) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            yield f"has the operation {operation.name} in a pickle"
        elif operation.name == "GLOBAL" and not GLOBALS.fullmatch(str(argument)):
            yield f"makes a {argument}"
