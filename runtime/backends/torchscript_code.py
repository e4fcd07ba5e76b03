"""Whether a TorchScript archive is nothing but a graph as kvx exports it: looked at before any of it is loaded.

A TorchScript module is a program. Loading one compiles the code of its classes, runs their `__setstate__` and the
default values of their methods, and believes what its pickles say about the sizes of tensors. So a pickle may hold
tensors within their records, the code one method `forward`, and that nothing but calls of OPERATORS.
"""

from __future__ import annotations

import ast
import io
import math
import pickle
import pickletools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from kvx.runtime.errors import BundleError

OPERATORS = frozenset(
    {
        *("add", "arange", "bitwise_not", "clamp", "div", "embedding", "flatten", "gelu", "index_put_", "layer_norm"),
        *("le", "linear", "lt", "masked_fill", "matmul", "mean", "mul", "permute", "pow", "relu", "reshape"),
        *("rms_norm", "select", "sigmoid", "silu", "size", "slice", "softmax", "std", "sub", "to", "transpose"),
        *("unflatten", "unsqueeze"),
    }
)
CALLS = {f"torch.{name}" for name in OPERATORS} | {"ops.prim.NumToTensor"}
DEVICE = "torch.device('cpu')"  # as `ast.unparse` writes it
ANNOTATE = "annotate(List[Optional[Tensor]], "
TYPES = re.compile(r"Tensor|Tuple\[Tensor(, Tensor)*\]")
ITEM_BYTES = {"torch.FloatStorage": 4, "torch.DoubleStorage": 8, "torch.LongStorage": 8, "torch.BoolStorage": 1}
CHARACTERS = re.compile(r'[A-Za-z0-9_ .,:=()\[\]\n>"-]*')  # no two parsers disagree about these
CODE = re.compile(r"code/((?:[A-Za-z0-9_]+/)*[A-Za-z0-9_]+)\.py")
OTHERS = re.compile(
    r"(data|constants)\.pkl|constants/\d+|(\.data/)?version|byteorder|\.data/serialization_id|code/.*\.debug_pkl"
)
APPROXIMATIONS = ("none", "tanh")  # of gelu, the only texts
LARGEST_CODE = 2**24  # bytes, of code and of pickles
OPCODES = frozenset(
    {
        *("PROTO", "STOP", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "MARK", "TUPLE", "TUPLE1", "TUPLE2"),
        *("TUPLE3", "EMPTY_TUPLE", "EMPTY_DICT", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
        *("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWFALSE", "NEWTRUE"),
    }
)


class Records(Protocol):
    """The records of an archive, as what loads it finds them."""

    def get_all_records(self) -> list[str]:
        """Their names."""
        ...

    def get_record(self, name: str, /) -> bytes:
        """The content of one."""
        ...

    def get_record_size(self, name: str, /) -> int:
        """Its bytes."""
        ...


def check_module(file: str, records: Records) -> None:
    """Raises BundleError for what is no export of kvx."""
    names = records.get_all_records()
    code = [name for name in names if CODE.fullmatch(name)]
    strangers = [name for name in names if not OTHERS.fullmatch(name) and name not in code]
    if strangers or len(code) != 1 or len({name.lower() for name in names}) < len(names):
        _refuse(file, f"the records {', '.join(strangers or code or names)[:200]}", "one graph and its constants")
    found = CODE.fullmatch(code[0])
    assert found is not None, "a name that has just been matched"
    module = found[1].replace("/", ".")
    graph = _unpickled(file, records, "data.pkl")
    if not isinstance(graph, _Graph) or graph.module != module or graph.state:
        _refuse(file, "another object than a graph without attributes", f"an object of {module}")
    constants = _unpickled(file, records, "constants.pkl")
    if not isinstance(constants, tuple) or not all(isinstance(one, _Tensor) for one in constants):
        _refuse(file, "constants that are no tensors", "tensors")
    for one in constants:
        one.check(file, records)
    _check_code(file, _text(file, records, code[0]), f"{module}.{graph.name}")


def _refuse(file: str, got: str, expected: str) -> NoReturn:
    raise BundleError(
        f"{file} is a program that kvx export did not write: it has {got}",
        expected=expected,
        remedy="Do not use this bundle with the torchscript backend: it may have been tampered with. If you exported "
        "it yourself, export it again with this version of kvx.",
    )


def _content(file: str, records: Records, name: str) -> bytes:
    if name not in records.get_all_records() or records.get_record_size(name) > LARGEST_CODE:
        _refuse(file, f"no {name}, or a very large one", f"{name} of at most {LARGEST_CODE:,} bytes")
    return records.get_record(name)


def _text(file: str, records: Records, name: str) -> str:
    text = _content(file, records, name).decode("ascii", "replace")
    if not CHARACTERS.fullmatch(text):
        _refuse(file, f"characters in {name} that code of kvx does not have", "the code of a graph")
    return text


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    items: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What a pickle says about a tensor."""

    storage: Any
    offset: Any
    size: Any
    strides: Any
    requires_grad: Any = False
    hooks: Any = None

    def check(self, file: str, records: Records) -> None:
        """Raises BundleError where it is not the whole of a record of the right size."""
        storage, sizes = self.storage, (*self.size, *self.strides, self.offset)
        strides = [math.prod(self.size[axis + 1 :]) for axis in range(len(self.size))]
        whole = (
            isinstance(storage, _Storage)
            and all(type(one) is int and one >= 0 for one in sizes)
            and (self.offset, storage.items) == (0, math.prod(self.size))
            and list(self.strides) == strides
            and f"constants/{storage.key}" in records.get_all_records()
            and records.get_record_size(f"constants/{storage.key}") == storage.items * ITEM_BYTES[storage.kind]
        )
        if not whole:
            _refuse(file, "a tensor that is not its record", "tensors within their records")


class _Graph:
    """The object of an archive, which has no attributes of its own."""

    module = name = ""

    def __init__(self) -> None:
        self.state: object = {}

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads what describes tensors and a graph; all else is refused, and nothing that is named is ever imported."""

    def __init__(self, file: str, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._file = file

    def find_class(self, module: str, name: str) -> object:
        """Inert stand-ins."""
        known = {"torch._utils._rebuild_tensor_v2": _Tensor, "collections.OrderedDict": dict}
        full = f"{module}.{name}"
        if full in known:
            return known[full]
        if full in ITEM_BYTES:
            return full
        if module.startswith("__torch__.") and not module.startswith("__torch__.torch."):
            return type(name, (_Graph,), {"module": module, "name": name})
        _refuse(self._file, f"an object of {full[:100]}", "tensors and a graph")

    def persistent_load(self, pid: object) -> _Storage:
        """A record."""
        kind, storage, key, _, items = pid if isinstance(pid, tuple) and len(pid) == 5 else (None,) * 5
        if kind != "storage" or storage not in ITEM_BYTES or not str(key).isdecimal() or type(items) is not int:
            _refuse(self._file, "another storage than of numbers", f"one of {', '.join(ITEM_BYTES)}")
        return _Storage(storage, str(key), items)


def _unpickled(file: str, records: Records, name: str) -> object:
    content = _content(file, records, name)
    try:
        unknown = {opcode.name for opcode, _, _ in pickletools.genops(content)} - OPCODES
        if unknown:
            _refuse(file, f"{', '.join(sorted(unknown))} in {name}", "tensors and a graph")
        return _Unpickler(file, content).load()
    except BundleError:
        raise
    except Exception as error:  # a pickle can fail in any way
        _refuse(file, f"{name} that cannot be read ({type(error).__name__})", "tensors and a graph")


def _check_code(file: str, text: str, name: str) -> None:
    try:
        [graph] = ast.parse(text).body
        unexpected = next(_Code(name).of_class(graph), None)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        _refuse(file, f"code that cannot be read ({type(error).__name__})", "the code of a graph")
    if unexpected is not None:
        _refuse(file, f"{unexpected!r:.100}", "one method that calls the operators of an export")


class _Code:
    """The code of a graph of the class `name`: what there is in it beyond a plain sequence of OPERATORS."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._locals: set[str] = set()

    def of_class(self, node: ast.stmt) -> Iterator[str]:
        """A class with no parameters and no buffers of its own, and one method."""
        if not isinstance(node, ast.ClassDef) or ast.unparse(ast.ClassDef(**{**vars(node), "body": []})) != (
            f"class {self._name.rpartition('.')[2]}(Module):"
        ):
            yield ast.unparse(node)
            return
        *lists, method = node.body
        if [ast.unparse(one) for one in lists] != ["__parameters__ = []", "__buffers__ = []"]:
            yield "; ".join(map(ast.unparse, lists))
        if isinstance(method, ast.FunctionDef):
            yield from self._of_method(method)
        else:
            yield ast.unparse(method)

    def _of_method(self, node: ast.FunctionDef) -> Iterator[str]:
        of = node.args
        special = (
            *of.defaults,
            *of.kw_defaults,
            *of.kwonlyargs,
            *of.posonlyargs,
            *node.decorator_list,
            of.vararg,
            of.kwarg,
        )
        if node.name != "forward" or any(special):
            yield f"def {node.name}({ast.unparse(of)})"
        types = [node.returns, *(one.annotation for one in of.args[1:])]
        yield from (text for text in map(_unparsed, types) if not TYPES.fullmatch(text))
        if [_unparsed(one.annotation) for one in of.args[:1]] != [self._name]:
            yield f"def forward({ast.unparse(of)})"
        self._locals.update(one.arg for one in of.args[1:])
        *statements, last = node.body
        for one in statements:
            yield from self._of_statement(one)
        yield from self._of_value(last.value) if isinstance(last, ast.Return) and last.value else [ast.unparse(last)]

    def _of_statement(self, node: ast.stmt) -> Iterator[str]:
        if not isinstance(node, ast.Assign) or not all(isinstance(target, ast.Name) for target in node.targets):
            yield ast.unparse(node)
            return
        yield from self._of_value(node.value)
        self._locals.update(ast.unparse(target) for target in node.targets)

    def _of_value(self, node: ast.expr) -> Iterator[str]:
        match node:
            case ast.Name(id=name) if name in self._locals:
                pass
            case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float):
                pass
            case ast.Constant(value=str(text)) if text in APPROXIMATIONS:
                pass
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, int | float):
                pass
            case ast.Attribute(value=ast.Name(id="CONSTANTS"), attr=attribute) if re.fullmatch(r"c\d+", attribute):
                pass
            case ast.List(elts=items) | ast.Tuple(elts=items):
                yield from self._of_values(items)
            case ast.Call():
                yield from self._of_call(node)
            case _:
                yield ast.unparse(node)

    def _of_call(self, node: ast.Call) -> Iterator[str]:
        called, whole = ast.unparse(node.func), ast.unparse(node)
        if called in CALLS:
            yield from self._of_values([*node.args, *(one.value for one in node.keywords)])
        elif called == "annotate" and whole.startswith(ANNOTATE) and not node.keywords:
            yield from self._of_values(node.args[1:])
        elif whole != DEVICE:
            yield called

    def _of_values(self, nodes: Sequence[ast.expr]) -> Iterator[str]:
        for node in nodes:
            yield from self._of_value(node)


def _unparsed(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)
