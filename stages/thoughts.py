"""How an answer begins with what the assistant thought: `clean` writes it so, and `add_bos_eos` looks for it.

THOUGHT.format("2+2") + "4"              ->  "<think>\\n2+2\\n</think>\\n\\n4"
begins("<think>\\n2+2\\n</think>\\n\\n4")    ->  True
"""

THOUGHT = "<think>\n{}\n</think>\n\n"  # as DeepSeek-R1 and Qwen3 write it, and Qwen3's template prints it
BEGIN, END = THOUGHT.split("{}")


def begins(text: str) -> bool:
    """Return whether a text begins with a whole thought."""
    return text.startswith(BEGIN) and END in text[len(BEGIN) :]
