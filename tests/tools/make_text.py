#!/usr/bin/env python3
"""Makes questions about long text for `vitrail eval`, from a book: a folder of HTML pages that name their next one
(<link rel="next">, from index.html on; the paragraphs are <div class="para">), or a text file. One set a run:

    make_text.py --set perplexity --tokens 2048 --count 6 --seed 1 BOOK OUT.jsonl

  perplexity   a stretch of the book, and as "continuation" what follows it there
  needle       a stretch of the book with the sentence "The secret number of CITY is 58231." between two of its
               sentences, at 10, 30, 50, 70 and 90% of its length in turn; behind it the question, in SmolLM2's chat
               format, with the answer begun up to the number

The recorded sets are of the Debian package debian-handbook (GPL-2.0+ or CC-BY-SA-3.0), whose pages lie in
/usr/share/doc/debian-handbook/html/en-US; none of its text is kept here. --tokens counts the stretch, by
--characters a token, as there is no tokenizer here: what a prompt really has, eval says. Python 3.9 and nothing else.
The same seed gives the same questions from the same book. Cases are seeded one by one: a smaller count gives the first
of a larger one."""
import argparse
import json
import os
import random
import re
from html.parser import HTMLParser

CITIES = ["Lisbon", "Vienna", "Oslo", "Prague", "Madrid", "Athens", "Dublin", "Warsaw", "Helsinki", "Rome", "Berlin",
          "Paris", "London", "Brussels", "Budapest", "Copenhagen", "Stockholm", "Lima", "Cairo", "Tokyo"]
DEPTHS = 0.1, 0.3, 0.5, 0.7, 0.9
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
NEEDLE = "The secret number of {} is {}."
TURN = ("<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}\n\n"
        "What is the secret number of {city}?<|im_end|>\n<|im_start|>assistant\nThe secret number of {city} is")


class Page(HTMLParser):
    """The paragraphs of a page, without what is set apart in them, and the name of the next page."""

    def __init__(self):
        super().__init__()
        self.paragraphs, self.next = [], None
        self.open = []  # whether each open block is a paragraph; text counts where the innermost one is

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") == "next":
            self.next = attrs["href"]
        if tag in ("div", "pre", "ul", "ol", "dl", "table"):
            self.open.append(tag == "div" and attrs.get("class") == "para")
            if self.open[-1]:
                self.paragraphs.append("")

    def handle_endtag(self, tag):
        if tag in ("div", "pre", "ul", "ol", "dl", "table") and self.open:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1]:
            self.paragraphs[-1] += data


def read_pages(folder):
    name, seen, paragraphs = "index.html", set(), []
    while name and name not in seen:
        seen.add(name)
        page = Page()
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            page.feed(f.read())
        paragraphs += page.paragraphs
        name = page.next
    return paragraphs


def read_book(path):
    """The text in one piece, a paragraph a line."""
    if os.path.isdir(path):
        paragraphs = read_pages(path)
    else:
        with open(path, encoding="utf-8") as f:
            paragraphs = re.split(r"\n\s*\n", f.read())
    lines = (re.sub(r"\s+", " ", p).strip() for p in paragraphs)
    return "\n".join(line for line in lines if line)


def sentence_end(text, at):
    """Behind the first sentence that ends at or behind `at`."""
    found = re.compile(r"[.!?](?=\s)").search(text, at)
    return found.end() if found else len(text)


def stretch(rng, book, size):
    """`size` characters, to a word's end, from a random sentence on, and where they end in the book."""
    start = sentence_end(book, rng.randrange(len(book) - size - 5000)) + 1
    end = book.index(" ", start + size)
    return book[start:end], end


def perplexity(rng, book, options, index):
    text, end = stretch(rng, book, int(options.tokens * options.characters))
    stop = book.index(" ", end + int(options.continuation * options.characters))
    return {"prompt": text, "continuation": book[end:stop]}


def needle(rng, book, options, index):
    text, _ = stretch(rng, book, int(options.tokens * options.characters))
    city, number = rng.choice(CITIES), str(rng.randint(10000, 99999))
    depth = DEPTHS[index % len(DEPTHS)]
    at = min(sentence_end(text, int(depth * len(text))), len(text))
    text = f"{text[:at]} {NEEDLE.format(city, number)}{text[at:]}"
    return {"prompt": TURN.format(system=SYSTEM, text=text, city=city), "answer": number, "depth": depth}


def main():
    parser = argparse.ArgumentParser(description="questions about long text for vitrail eval")
    parser.add_argument("book", help="folder of HTML pages, or a text file")
    parser.add_argument("out", help="file to write")
    parser.add_argument("--set", choices=("perplexity", "needle"), required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="length of the stretch (%(default)s)")
    parser.add_argument("--characters", type=float, default=4.5, help="characters a token (%(default)s)")
    parser.add_argument("--continuation", type=int, default=330,
                        help="tokens of a continuation (%(default)s: enough for the 256 that eval takes)")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    book = read_book(options.book)
    make = perplexity if options.set == "perplexity" else needle
    with open(options.out, "w", encoding="utf-8") as out:
        for index in range(options.count):
            rng = random.Random(f"{options.set} {options.seed} {index}")
            name = f"{options.set}-{options.tokens}-{options.seed}-{index:03d}"
            out.write(json.dumps({"id": name, **make(rng, book, options, index), "task": options.set}) + "\n")


if __name__ == "__main__":
    main()
