"""Chat templates: jinja, rendered as transformers renders it, but within bounds.

The oracle is transformers' `apply_chat_template(tokenize=False)`: a sandboxed environment with
trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that escapes nothing,
and `{% generation %}` blocks. A template comes from strangers: it may loop for ever or double a
text until memory is gone. Jinja's sandbox does not stop that, so loops, macro calls and growing
texts are counted here, and a template over its budget ends in a UserError.
"""

import hashlib
import json
from collections.abc import Sized
from datetime import date, datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes

from whet.chat.bounds import GROWING, MACRO_STEPS, Budget, TemplateError
from whet.chat.conversation import Message
from whet.errors import UserError

CHAIN = 8  # additions of one expression that are measured together
LITERALS = (nodes.List, nodes.Tuple, nodes.Dict)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=budget.told,
        )
        self.budget = budget
        self.concat = budget.concat  # type: ignore[method-assign]
        self.globals.pop("lipsum", None)
        self.globals["dict"] = _Dict()
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = budget.guard(name, function)
        self.filters["_made"] = budget.made
        self.filters["_nested"] = budget.nested
        self.filters["_count"] = budget.count

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, Sized) and isinstance(times, int):
                    self.budget.spend(len(text) * times)
        elif operator == "%":
            self.budget.before_format(left, right)
        elif not (abs(left) < 1e6 and abs(right) < 64):
            raise TemplateError(f"the chat template computes {left}**{right}")
        return self.budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        name = getattr(__function, "__name__", "")
        if name in GROWING:
            subject = getattr(__function, "__self__", None)
            __self.budget.before_call(name, subject, args, kwargs)
        return __self.budget.called(super().call(__context, __function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        form = super().wrap_str_format(value)
        if form is None:
            return None

        @wraps(form)
        def judged(*args: Any, **kwargs: Any) -> str:
            self.budget.before_format(value.__self__, (*args, *kwargs.values()))
            return form(*args, **kwargs)

        return judged


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders what it encloses, in a scope of its own.

    The tags say what somebody believed to be the model's words; Whet finds them by itself.
    """

    tags = {"generation"}  # noqa: RUF012 -- jinja's own interface

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """The `dict` of templates: callable, without the attributes that lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """A compiled chat template.

    `source` is the jinja text, `hash` its sha256. Raises UserError if it is no valid jinja.
    Not to be shared between threads: its budget and date are those of one rendering.
    """

    def __init__(self, source: str, name: str = "chat template") -> None:
        self.source = source
        self.name = name
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self._budget = Budget()
        self._today: date | None = None
        environment = _Environment(self._budget)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now
        try:
            tree = environment.parse(source)
            # A name is undeclared, too, if the template sets it in one branch only.
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree)) - frozenset(
                environment.globals
            )
            self.compared = _compared_constants(tree)
            self._template = environment.from_string(_counted(tree))
            # A plain dict: each rendering copies it, and a ChainMap is slow to copy.
            self._template.globals = dict(self._template.globals)
            # Blocks and macros join what they print by these names of their module.
            names = self._template.root_render_func.__globals__
            names["concat"] = self._budget.concat
            for name in ("str_join", "markup_join"):
                names[name] = self._budget.joining(names[name])
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}: line {error.lineno}: {error.message}") from None
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception as error:  # Python's own limits: nesting, numbers of thousands of digits
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{name}: cannot be compiled: {what}") from None

    def _strftime_now(self, form: str) -> str:
        if len(form) > 1000:
            raise TemplateError(f"the chat template asks for a date of {len(form):,} characters")
        today = self._today
        now = datetime(today.year, today.month, today.day) if today else datetime.now()
        return now.strftime(form)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self.name)

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        today: date | None = None,
        **variables: Any,
    ) -> str:
        """The text of `messages`. `today` is what `strftime_now` tells (None: the clock's time).

        `variables` are further template variables: bos_token, eos_token, enable_thinking, …
        Raises TemplateError with the template's own words if it refuses or fails.
        """
        self._budget.renew()
        self._today = today
        try:
            text = self._template.render(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses: {error.message or error}") from None
        except RecursionError:
            raise TemplateError("the chat template calls itself without end") from None
        except Exception as error:  # templates run code of their own; what it raises is its fault
            what = f"{type(error).__name__}: {error}"
            raise TemplateError(f"the chat template fails with {what}") from None
        return text


def _counted(tree: nodes.Template) -> nodes.Template:
    """`tree` with every round of a loop and every call of a macro counted, every sum measured."""
    repeated: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For)]
    repeated += tree.find_all(nodes.Macro)
    for body_of in repeated:
        steps = 1 if isinstance(body_of, nodes.For) else MACRO_STEPS
        # A filter, since the sandbox checks each call of a function, which costs more than the loop
        count = nodes.Filter(nodes.Const(steps), "_count", [], [], None, None)
        body_of.body.insert(0, nodes.ExprStmt(count).set_lineno(body_of.lineno))
    _measure(tree)
    return tree


def _measure(node: nodes.Node) -> int:
    """Wrap what can grow: lists, slices, and sums; returns how many sums in a row `node` ends.

    A short chain of + is measured once, at its end; one that is put out at once is left alone: it
    cannot grow any further.
    """
    longest = 0

    def measured(child: Any) -> Any:
        nonlocal longest
        if not isinstance(child, nodes.Node):
            return child
        chain = _measure(child)
        if isinstance(child, LITERALS) and _holds_variables(child) and not _is_target(child):
            name = "_nested"
        elif (
            (isinstance(child, nodes.Getitem) and isinstance(child.arg, nodes.Slice))
            or chain >= CHAIN
            or (chain and not isinstance(node, nodes.Add | nodes.Output))
        ):
            name = "_made"
        else:
            longest = max(longest, chain)
            return child
        return nodes.Filter(child, name, [], [], None, None).set_lineno(child.lineno)

    for name, value in list(node.iter_fields()):
        many = isinstance(value, list)
        setattr(node, name, [measured(item) for item in value] if many else measured(value))
    return longest + 1 if isinstance(node, nodes.Add) else 0


def _holds_variables(literal: nodes.Node) -> bool:
    return next(literal.find_all((nodes.Name, nodes.NSRef)), None) is not None


def _is_target(literal: nodes.Node) -> bool:
    """`a, b` on the left of `=` or in `for a, b in`: no value."""
    return getattr(literal, "ctx", "load") != "load"


def _compared_constants(tree: nodes.Template) -> dict[str, frozenset[Any]]:
    """The constants that each variable is compared with: `mode == "chat"` gives mode: {"chat"}."""
    found: dict[str, set[Any]] = {}
    for compare in tree.find_all(nodes.Compare):
        if not isinstance(compare.expr, nodes.Name):
            continue
        for operand in compare.ops:
            values = operand.expr.items if isinstance(operand.expr, nodes.List) else [operand.expr]
            for value in values:
                if isinstance(value, nodes.Const) and isinstance(value.value, str | bool | int):
                    found.setdefault(compare.expr.name, set()).add(value.value)
    return {name: frozenset(values) for name, values in found.items()}


def read_variables(text: str | None) -> dict[str, Any]:
    """The variables of `--template_kwargs`, a JSON object. Raises UserError for anything else."""
    try:
        given = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--template_kwargs: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f"--template_kwargs: expected a JSON object, got {text}")
    return given
