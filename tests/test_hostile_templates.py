"""Chat templates run in the same sandbox as cards: whatever runs on is cut, and what published templates do works."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inference.errors import CheckpointError
from inference.tokenizer import WORK, Tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOh"}]


def render(template: str, messages=CHAT, **variables) -> str:
    model = Tokenizer(Path("model"), frozenset(), template, {"eos_token": "</s>"}, None)  # type: ignore[arg-type]
    return model.render_chat(messages, **variables)


RUNS_ON = [
    "{% set l = [1] * 1000 %}{% for a in l %}{% for b in l %}{% for c in l %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [[]] recursive %}{% if loop.depth < 90 %}{{ loop([1]) }}{{ loop([1]) }}{% endif %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
    "{% for i in range(99999) %}" + "0123456789" * 99 + "{% endfor %}",
    "{{ ('x' * 9999).replace('', 'x' * 9999) }}",
    "{{ ('x' * 9999).join('x' * 9999) }}",
    "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "{{ [[[[[1]]]]] | tojson(indent=9999) }}",
    "{{ '\t'.expandtabs(10 ** 9) }}",
    "{{ (5).to_bytes(10 ** 9) }}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ lipsum(10 ** 6) }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ 1e999 }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ [1] | batch(10 ** 9, 1) | list | length }}",
    "{{ " + "(" * 9999 + ")" * 9999 + " }}",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ [" + "a," * 50_000 + "] }}",
    "{{ a" + ".b" * 20_000 + " }}",
    "{{ 'x' }}" * 40_000,
]


@pytest.mark.parametrize("template", RUNS_ON, ids=range(len(RUNS_ON)))
def test_a_chat_template_that_runs_on_is_cut(template):
    with pytest.raises(CheckpointError) as e:
        render(template)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 400


def test_what_published_templates_do_gives_what_plain_jinja_gives():
    template = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- macro show(m, n) -%}<|{{ m['role'] }}|>{{ m.content.split('</think>')[-1].lstrip('\\n') | trim }}{{ n }}{%- endmacro -%}
{%- for m in messages[::-1] %}{% if loop.index > 5 %}{% break %}{% endif %}{{ show(m, loop.length) }}
{%- endfor %}
{%- if tools is iterable and tools is not mapping %}{{ tools | map(attribute='name') | list | tojson }}{% endif %}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a' in 'abc' }}{{ none }}{{ absent }}
{{- {'b': 1, 'a': 2} | dictsort | tojson(indent=1) | replace('\\n', '') }}{{ '%02d:%s' % (7, 'x') }}{{ '{:>4}'.format('y') }}
{%- for k, v in messages[0].items() %}[{{ k }}={{ v | string }}]{% endfor %}{{ strftime_now('%Y') | length }}"""
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    plain.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    plain.globals["strftime_now"] = datetime.datetime.now().strftime
    variables = {"tools": [{"name": "t"}], "eos_token": "</s>"}
    assert render(template, **variables) == plain.from_string(template).render(messages=CHAT, **variables)
    assert render(template, **variables) == (
        '<|assistant|>Oh2<|user|>Hi2["t"]1TrueNone[ [  "a",  2 ], [  "b",  1 ]]07:x   y[role=user][content=Hi]4'
    )


def test_the_budget_grows_with_the_conversation():
    """A megabyte of messages is handled as often as templates do."""
    long = [{"role": "user", "content": "word " * 10_000}] * 20
    template = "{% for m in messages %}{% for n in messages %}{% set x = n.content | trim %}{% endfor %}{{ m.content }}"
    template += "{% endfor %}"
    assert len(render(template, long)) == sum(len(m["content"]) for m in long)
    assert 20 * len(long) * len(long[0]["content"]) >= WORK


def test_a_conversation_is_not_changed_by_its_template():
    messages = [{"role": "user", "content": "Hi"}]
    for expression in ("messages.append(1)", "messages[0].update({})", "messages[0].pop('role')", "messages.clear()"):
        with pytest.raises(CheckpointError, match="SecurityError"):
            render("{{ " + expression + " }}", messages)
    assert messages == [{"role": "user", "content": "Hi"}]
