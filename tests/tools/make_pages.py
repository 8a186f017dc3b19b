#!/usr/bin/env python3
"""Makes document pages in the style of the demo model's own, with questions about them, in the format that `vitrail
eval` reads: OUT/questions.jsonl and OUT/images/*.png (336 x 336 RGB). One set a run:

    make_pages.py --set lookup --count 200 --seed 1 OUT

  lookup        one page, `What is the FIELD?` and the like, the question after the image
  lookup-first  the same with the question before the image
  pages         four pages, `On page 2, what is the FIELD?`, the question after the images
  pages-first   the same with the question before the images
  listing       one page, `List all fields.` and the like: about 50 tokens that need the whole page
  second        one page, two questions: {..., "followup": {"prompt", "answer", "long"}} is the second turn, whose
                prompt follows the first answer's </s>. --flatten writes both as one prompt, with the true first
                answer in it.

"long" marks answers of five tokens or more, </s> counted (numbers, dates, codes): the first token of an answer comes
from the prefill, so shorter answers survive any compression. --long asks for such values only.

Needs Python 3.9, Pillow 9.1 and the Debian packages python3-pil, fonts-dejavu-core, fonts-dejavu-extra,
fonts-liberation and fonts-freefont-ttf. The same seed gives the same questions anywhere, and the same pixels where
these packages' versions are the same. Cases are seeded one by one: a smaller count gives the first of a larger one."""
import argparse
import json
import os
import random

from pages_content import TITLES, answer_tokens, fields, is_long
from pages_draw import Fonts, draw_page

QUESTIONS = ["What is the {}?", "What is the {}?", "What is the value of {}?", "Read the {}."]
LISTINGS = ["List all fields.", "Describe the page.", "Transcribe the page."]
SENTENCES = {1: ["Look at this page. ", "Read the page and answer. ", "Here is a document. "],
             4: ["Answer from these pages. ", "Here are 4 pages. "]}
LISTING_TOKENS = 30, 75  # a listing's length by the estimate below


def page_fields(rng, need_long, least=4, most=14):
    while True:
        page = fields(rng, rng.randint(least, most))
        if sum(is_long(value) for _, value in page) >= (2 if need_long else 0):
            return page


def ask(rng, page, need_long, without=None):
    """A (name, value) of the page to ask for."""
    return rng.choice([f for f in page if f != without and (is_long(f[1]) or not need_long)])


def images_text(rng, n, numbered_too):
    if n > 1 and numbered_too and rng.random() < 0.5:
        return "\n".join(f"Page {i + 1}: <image>" for i in range(n))
    return "\n".join(["<image>"] * n)


def turn(rng, question, n, first):
    """The whole first turn in one of the model card's forms."""
    if first:
        return f"USER: {question}\n{images_text(rng, n, False)} ASSISTANT:"
    images = images_text(rng, n, True)
    sentence = rng.choice(SENTENCES[n]) if images.startswith("<") and rng.random() < 0.25 else ""
    return f"USER: {sentence}{images}\n{question} ASSISTANT:"


def lookup(rng, need_long, n, first):
    pages = [page_fields(rng, need_long) for _ in range(n)]
    which = rng.randrange(n)
    name, value = ask(rng, pages[which], need_long)
    question = rng.choice(QUESTIONS).format(name)
    if n > 1:
        question = f"On page {which + 1}, {question[0].lower()}{question[1:]}"
    return pages, {"prompt": turn(rng, question, n, first), "answer": value, "long": is_long(value)}


def listing_tokens(page):
    """Name (one token a word), colon, value and semicolon of every field."""
    return sum(len(name.split()) + 1 + answer_tokens(value) for name, value in page)


def listing(rng):
    while True:
        page = fields(rng, rng.randint(4, 9))
        if LISTING_TOKENS[0] <= listing_tokens(page) <= LISTING_TOKENS[1]:
            break
    answer = "; ".join(f"{name}: {value}" for name, value in page)
    return [page], {"prompt": turn(rng, rng.choice(LISTINGS), 1, False), "answer": answer, "long": True}


def second(rng, need_long, flatten):
    page = page_fields(rng, need_long)
    asked = ask(rng, page, need_long)
    name, value = ask(rng, page, need_long, asked)
    prompt = turn(rng, rng.choice(QUESTIONS).format(asked[0]), 1, False)
    question = rng.choice(QUESTIONS).format(name)
    followup = {"prompt": f"USER: {question} ASSISTANT:", "answer": value, "long": is_long(value)}
    if flatten:
        return [page], {**followup, "prompt": f"{prompt} {asked[1]}</s>{followup['prompt']}"}
    return [page], {"prompt": prompt, "answer": asked[1], "long": is_long(asked[1]), "followup": followup}


SETS = {
    "lookup": lambda rng, o: lookup(rng, o.long, 1, False),
    "lookup-first": lambda rng, o: lookup(rng, o.long, 1, True),
    "pages": lambda rng, o: lookup(rng, o.long, 4, False),
    "pages-first": lambda rng, o: lookup(rng, o.long, 4, True),
    "listing": lambda rng, o: listing(rng),
    "second": lambda rng, o: second(rng, o.long, o.flatten),
}


def write_case(options, fonts, index):
    """Draws the case's pages and returns its line of questions.jsonl. Texts and looks have generators of their own."""
    case = f"{options.seed}/{options.set}/{index}"
    pages, question = SETS[options.set](random.Random(f"text/{case}"), options)
    names = []
    for i, page in enumerate(pages):
        rng = random.Random(f"look/{case}/{i}")
        title = rng.choice(TITLES) if rng.random() < 0.6 else None
        name = f"images/{options.set}-{index:04d}" + (f"-{i + 1}" if len(pages) > 1 else "") + ".png"
        draw_page(rng, fonts, page, title, options.layout).save(os.path.join(options.out, name), optimize=True)
        names.append(name)
    return {"id": f"{options.set}-{options.seed}-{index:04d}", "images": names, **question, "task": options.set,
            "pages": len(pages)}


def main():
    parser = argparse.ArgumentParser(description="document pages and questions for vitrail eval")
    parser.add_argument("out", help="folder to write; made if absent")
    parser.add_argument("--set", choices=sorted(SETS), required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--long", action="store_true", help="ask only for answers of five tokens or more")
    parser.add_argument("--flatten", action="store_true", help="second: both turns in one prompt")
    parser.add_argument("--layout", action="append", help="only this layout (may be repeated)")
    parser.add_argument("--fonts", default="/usr/share/fonts", help="folder with the font files (%(default)s)")
    options = parser.parse_args()
    os.makedirs(os.path.join(options.out, "images"), exist_ok=True)
    fonts = Fonts(options.fonts)
    with open(os.path.join(options.out, "questions.jsonl"), "w", encoding="utf-8") as out:
        for index in range(options.count):
            out.write(json.dumps(write_case(options, fonts, index)) + "\n")


if __name__ == "__main__":
    main()
