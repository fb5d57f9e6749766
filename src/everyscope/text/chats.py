"""Requests and answers made from Python sources: what the bundled instruction-tuned model was tuned on.

The turns are Gemma's. A tokenizer that knows their markers reads each as one token; to any other they are text.
"""

import ast
from collections.abc import Iterator

USER_TURN, MODEL_TURN, END_OF_TURN = "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"


def chat(request: str, answer: str) -> str:
    """Both turns as the text that a model reads behind BOS."""
    return f"{USER_TURN}{request}{END_OF_TURN}{MODEL_TURN}{answer}{END_OF_TURN}"


def chats_of(source: str) -> Iterator[tuple[str, str]]:
    """(request, answer) pairs about each documented function of a Python source; none where it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if isinstance(node, ast.FunctionDef) and docstring:
            yield from chats_about(node, docstring.split("\n\n")[0])


def chats_about(function: ast.FunctionDef, summary: str) -> tuple[tuple[str, str], ...]:
    """Three tasks: describe the function, name it from its description, write its body."""
    changes = {"body": function.body[1:] or [ast.Pass()], "decorator_list": []}
    bare = ast.copy_location(ast.FunctionDef(**(dict(ast.iter_fields(function)) | changes)), function)
    code = ast.unparse(bare)
    header, _, body = code.partition("\n")
    return (
        (f"Write a docstring for this function.\n\n{code}", summary),
        (f"Which function does this?\n\n{summary}", header),
        (f'Write the body of this function.\n\n{header}\n    """{summary}"""', body),
    )
