"""Captions as PixArt-alpha's text encoder saw them: what web pages leave in alternative texts is taken out.

The rules are those of DeepFloyd IF, which PixArt follows; they are not idempotent, and PixArt applies them twice. What
they also do there and is left alone here: text in a wrong encoding is not repaired.
"""

import html
import re
from urllib.parse import unquote_plus

PICTURE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
DASHES += r"\ufe31\ufe32\ufe58\ufe63\uff0d"
IDEOGRAPHS = "\u31c0-\u4dff\u4e00-\u9fff"

RULES = [  # what is found -> what stands there afterwards, one rule after the other; the text is lower case
    (r"<person>", "person"),
    (r"\b(?:https?:(?:/{1,3}|[\w%])|[\w.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))", ""),
    (r"\b(?:www:(?:/{1,3}|[\w%])|[\w.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))", ""),
    (r"<[^<>]*>", ""),  # mark-up
]
RULES_OF_TEXT = [  # when what mark-up stands for has been put in its place
    (r"@\w+\b", ""),  # names of users
    (f"[{IDEOGRAPHS}]+", ""),
    (f"[{DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),  # a length of time at the end
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # numbers of articles
    (rf"\S+\.(?:{PICTURE})", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
RULES_OF_CODES = [
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{PICTURE})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:\-+]$", ""),
    (r"^\.\S+$", ""),
]
MANY_JOINED = 3  # words joined by dashes or underscores: more of them are the name of something, and come apart


def clean_caption(text: str) -> str:
    """A caption as PixArt encodes it."""
    return _cleaned(_cleaned(text))


def _cleaned(text: str) -> str:
    text = _apply(RULES_OF_TEXT, html.unescape(_apply(RULES, unquote_plus(text).strip().lower())))
    if len(re.findall(r"[-_]", text)) > MANY_JOINED:
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(text)).strip()
    return _apply(RULES_OF_CODES, text).strip()


def _apply(rules: list[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
