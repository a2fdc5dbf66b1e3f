"""Templates that attack their reader: time, memory, output, the parser, the sandbox. Each must end in TemplateError."""

from __future__ import annotations

_ATTRIBUTES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"

TIME = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "five loops deep": "{% for a in range(999) %}" * 5 + "{% endfor %}" * 5,
    "big power": "{{ 10 ** (10 ** 9) }}",
    "big power, folded while compiling": "{% set x = 9 ** (9 ** 9) %}",
    "big power from a variable": "{% set n = messages | length + 9 %}{{ n ** (n ** (n ** n)) }}",
    "squaring": "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "modular power": "{{ (3 ** 3000000) % 7 }}",
    "shift by multiplication": "{{ (2 ** 40000000) // (3 ** 20000000) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "two-way macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "call block fan-out": (
        "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}{% endif %}"
        "{% endmacro %}{{ f(60) }}"
    ),
    "count in a big string": "{{ ('a' * 20000000).count('aaaaaaaab') }}" * 40,
    "search in a big string": "{{ 'a' * 9000000 in 'b' * 9000000 + 'a' * 8999999 }}" * 60,
    "quadratic replace": "{% set h = messages[0].content * 99999 %}{% for i in range(99999) %}"
    "{% set x = h | replace('h', 'b') %}{% endfor %}",
    "sum of ranges": "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "sort": "{% for i in range(99999) %}{% set x = range(99999) | sort(reverse=true) %}{% endfor %}",
    "group": "{% for i in range(99999) %}{% set x = range(9999) | batch(2) | list %}{% endfor %}",
    "url finder": "{{ ('www.a.' * 99999) | urlize }}" * 9,
    "tag stripper": "{{ ('<' * 99999 + '<!--' * 99999) | striptags }}" * 50,
    "word wrap": "{{ ('a ' * 999999) | wordwrap(1) }}" * 9,
    "title case": "{{ ('a ' * 2999999) | title }}" * 9,
    "escape": "{% for i in range(9999) %}{% set x = ('<&>' * 99999) | e %}{% endfor %}",
    "cycler": "{% set c = cycler(1, 2) %}{% for a in range(99999) %}{% for b in range(9999) %}{% set x = c.next() %}"
    "{% endfor %}{% endfor %}",
    "joiner": "{% set j = joiner(',') %}{% for a in range(99999) %}{% for b in range(9999) %}{% set x = j() %}"
    "{% endfor %}{% endfor %}",
    "while by continue": "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "inside generation": "{% generation %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endgeneration %}",
    "constant folding": "{{ " + "'a' * 9999999 ~ " * 300 + "'a' }}",
    "many big constants": "{% set x = (3 ** 999999) | string | length %}" * 200,
}
MEMORY = {
    "huge string": "{{ 'a' * 10 ** 9 }}",
    "huge list": "{{ [0] * 10 ** 9 }}",
    "huge tuple": "{% set x = (1, 2) * 10 ** 8 %}",
    "doubling": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "padding": "{{ 'a'.ljust(10 ** 9) }}",
    "zero padding": "{{ '7'.zfill(10 ** 9) }}",
    "centre filter": "{{ 'a' | center(10 ** 9) }}",
    "percent format": "{{ '%1000000000d' % 7 }}",
    "format width": "{{ '{:>1000000000}'.format(7) }}",
    "format filter": "{{ '%01000000000d' | format(7) }}",
    "join bomb": "{{ (['a' * 9999999] * 999) | join(',') }}",
    "replace bomb": "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
    "indent bomb": "{{ ('\n' * 99999) | indent(99999, blank=true) }}",
    "json indent bomb": "{{ ([[[[[1]]]]] * 9) | tojson(indent=10 ** 9) }}",
    "expand tabs": "{{ ('\t' * 9999).expandtabs(10 ** 6) }}",
    "list of a product": "{{ (range(99999) | list) * 9999 }}",
}
OUTPUT = {
    "printing loop": "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "one large piece": "{{ 'a' * 1000001 }}",
    "large numbers": "{{ ((range(99999) | list) * 3) | join(',') }}",
    "messages repeated": "{{ messages[0].content * 400000 }}",
}
DEPTH = {
    "parentheses": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "lists": "{{ " + "[" * 9000 + "]" * 9000 + " }}",
    "nots": "{{ " + "not " * 20000 + "1 }}",
    "minuses": "{{ " + "-" * 50000 + "1 }}",
    "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "loops": "{% for a in [1] %}" * 2000 + "{% endfor %}" * 2000,
    "filters": "{{ 'a'" + " | upper" * 30000 + " }}",
    "subscripts": "{{ messages" + "[0]" * 40000 + " }}",
    "sums": "{{ 1" + " + 1" * 50000 + " }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "unclosed block": "{% for a in range(3) %}",
    "unknown tag": "{% frobnicate %}",
    "unclosed comment": "{# for ever",
    "empty print": "{{ }}",
}
ESCAPE = {
    "class": _ATTRIBUTES,
    "class by filter": "{{ (''|attr('__class__')).mro() }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class through format": "{{ '{0.__class__.__mro__}'.format('') }}{{ raise_exception('blocked') }}",
    "class through format_map": "{{ '{x.__class__.__init__.__globals__}'.format_map({'x': messages}) }}",
    "method of format": "{% set f = '{0.__class__.__name__}'.format %}{{ f(f) }}",
    "globals of a global": "{{ raise_exception.__globals__['os'].system('true') }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of joiner": "{{ joiner.__init__.__globals__.__builtins__ }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('true') }}",
    "lipsum": "{{ lipsum(n=100000, min=99, max=100) }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__.x.y }}",
    "generator frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "code object": "{{ strftime_now.__code__.co_consts[0].x }}",
    "namespace dunder": "{{ namespace(__class__=1) }}",
    "namespace dunder set": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "dict type": "{{ dict.__base__.__subclasses__() }}",
    "context": "{{ self.__init__.__globals__.x }}",
    "template reference": "{{ self._TemplateReference__context.environment.x }}",
    "change a message": "{{ messages.append(1) }}",
    "change a dictionary": "{{ messages[0].update({'role': 'system'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "python import": "{% import os %}",
    "from import": "{% from 'os' import system %}{{ system('true') }}",
    "builtin import": "{{ __import__('os').system('true') }}",
    "sleep": "{% set time = joiner.__init__.__globals__['time'] %}{{ time.sleep(9) }}",
    "sleep by import": "{% from 'time' import sleep %}{{ sleep(9) }}",
    "do tag": "{% do messages.clear() %}",
    "debug tag": "{% debug %}",
    "huge range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "strftime bomb": "{{ strftime_now('%Y' * 9000000) }}",
    "raise": "{{ raise_exception('a reason\nin two lines') }}",
    "undefined call": "{{ nothing() }}",
    "divide by zero": "{{ 1 // 0 }}",
    "lone surrogate": "{{ '\\ud800' }}",
    "huge number to text": "{{ 10 ** 5000 }}",
}
HOSTILE = {
    f"{kind}: {name}": source
    for kind, group in {"time": TIME, "memory": MEMORY, "output": OUTPUT, "depth": DEPTH, "escape": ESCAPE}.items()
    for name, source in group.items()
}
