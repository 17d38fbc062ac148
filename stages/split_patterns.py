"""The regular expressions by which published byte-level tokenizers cut a text into words, which no merge crosses.

They are the pattern of the Split before ByteLevel in tokenizer.json; BYTE_LEVEL is what ByteLevel does by itself.
"""

ENDS, TAIL = r"'s|'t|'re|'ve|'m|'ll|'d", r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER, LEAD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"

BYTE_LEVEL = ENDS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2
# Digits in threes (Qwen: one by one), line breaks by themselves, and one mark before a word belongs to it.
LLAMA_3 = rf"(?i:{ENDS})|{LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TAIL}"
QWEN_2 = rf"(?i:{ENDS})|{LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TAIL}"  # and Qwen 3
O200K = (  # gpt-oss
    rf"{LEAD}{UPPER}*{LOWER}+(?i:{ENDS})?|{LEAD}{UPPER}+{LOWER}*(?i:{ENDS})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{TAIL}"
)
