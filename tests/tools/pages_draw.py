"""Draws one page of make_pages.py: fields in one of seven layouts, in one of the fonts below, on a light, tinted or
dark ground. The limits are those of the demo model's training: fonts of 13 to 22 pixels on a page of 336 x 336."""
import colorsys
import os

from PIL import Image, ImageDraw, ImageFont

SIDE = 336
EDGE = 6  # no text nearer to the border
SMALLEST, LARGEST = 13, 22

# (regular, bold) files of fonts-dejavu-core, fonts-dejavu-extra, fonts-liberation and fonts-freefont-ttf.
FACES = [("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"), ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
         ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"), ("DejaVuSansCondensed.ttf", "DejaVuSansCondensed-Bold.ttf"),
         ("DejaVuSerifCondensed.ttf", "DejaVuSerifCondensed-Bold.ttf"),
         ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf"),
         ("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf"),
         ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf"), ("FreeSans.ttf", "FreeSansBold.ttf"),
         ("FreeSerif.ttf", "FreeSerifBold.ttf")]


class Fonts:
    """The faces above, found by file name under a folder of fonts."""

    def __init__(self, folder):
        found = {name: os.path.join(at, name) for at, _, names in sorted(os.walk(folder)) for name in sorted(names)}
        missing = [name for pair in FACES for name in pair if name not in found]
        if missing:
            raise SystemExit(f"{folder}: no {', '.join(missing)}; install fonts-dejavu-core, fonts-dejavu-extra, "
                             "fonts-liberation and fonts-freefont-ttf, or give --fonts")
        self.paths, self.open = found, {}

    def get(self, name, size):
        if (name, size) not in self.open:
            self.open[name, size] = ImageFont.truetype(self.paths[name], size, layout_engine=ImageFont.Layout.BASIC)
        return self.open[name, size]


def hsv(hue, saturation, value):
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def mix(a, b, share):
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


def luminance(color):
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


class Style:
    """Everything random about a page's looks. Drawn up whole before anything is measured, so that two machines whose
    fonts differ by a pixel still draw pages of the same kind."""

    def __init__(self, rng):
        self.layout = rng.choice(sorted(LAYOUTS))
        self.face = rng.choice(FACES)
        weights = [(False, False), (False, False), (True, False), (False, True), (True, True)]
        self.key_bold, self.value_bold = rng.choice(weights)
        self.size = rng.randint(SMALLEST, LARGEST)
        self.dark = rng.random() < 0.15
        self.ground = self.pick_ground(rng)
        self.key_color = self.pick_ink(rng)
        self.value_color = self.key_color if rng.random() < 0.6 else self.pick_ink(rng)
        self.capitals = rng.random() < 0.6
        self.colon = ":" if rng.random() < 0.5 else ""
        self.rule = rng.choice(["none", "none", "solid", "dashed"])
        self.banded, self.dotted = rng.random() < 0.3, rng.random() < 0.5
        self.framed = rng.random() < 0.25
        self.bar, self.centered = rng.random() < 0.25, rng.random() < 0.5
        self.left, self.top, self.air = rng.random(), rng.random() ** 1.5, rng.random()
        self.jitter = [rng.random() for _ in range(16)]
        self.specks = [(rng.randrange(SIDE), rng.randrange(SIDE)) for _ in range(rng.randint(8, 60))] \
            if rng.random() < 0.35 else []

    def pick_ground(self, rng):
        if self.dark:
            return hsv(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.06, 0.2))
        if rng.random() < 0.12:
            return 255, 255, 255
        return hsv(rng.random(), rng.uniform(0.01, 0.13), rng.uniform(0.84, 1))

    def pick_ink(self, rng):
        while True:
            value = rng.uniform(0.75, 1) if self.dark else rng.uniform(0, 0.5)
            ink = hsv(rng.random(), rng.uniform(0, 0.25 if self.dark else 0.9), value)
            if contrast(ink, self.ground) >= 6:
                return ink


class Page:
    """One attempt at a page: a layout puts texts and strokes on it in the style's font at a size and notes overflow."""

    def __init__(self, fonts, style, fields, title, size):
        self.style, self.size = style, size
        self.key_font = fonts.get(style.face[style.key_bold], size)
        self.value_font = fonts.get(style.face[style.value_bold], size)
        self.title_font = fonts.get(style.face[1], min(LARGEST, size + 2))
        self.line = max(sum(font.getmetrics()) for font in (self.key_font, self.value_font))
        self.items, self.fits = [], True
        self.keys = [(name if style.capitals else name.title()) + style.colon for name, _ in fields]
        self.values = [value for _, value in fields]
        self.start = self.put_title(title) if title else EDGE

    def text(self, x, y, string, font, color):
        self.fits &= EDGE <= x and x + font.getlength(string) <= SIDE - EDGE and y + self.line <= SIDE - EDGE
        self.items.append(("text", (round(x), round(y)), string, font, color))

    def key(self, i, x, y):
        self.text(x, y, self.keys[i], self.key_font, self.style.key_color)

    def value(self, i, x, y):
        self.text(x, y, self.values[i], self.value_font, self.style.value_color)

    def key_width(self, i):
        return self.key_font.getlength(self.keys[i])

    def value_width(self, i):
        return self.value_font.getlength(self.values[i])

    def stroke(self, x0, y, x1, pattern, share=0.5):
        if pattern != "none":
            dash = {"solid": SIDE, "dashed": 4, "dotted": 1}[pattern]
            color = mix(self.style.ground, self.style.key_color, share)
            for x in range(round(x0), round(x1), 2 * dash):
                self.items.append(("line", (x, round(y), min(x + dash - 1, round(x1)), round(y)), color))

    def box(self, x0, y0, x1, y1, filled):
        style = self.style
        fill = mix(style.ground, style.key_color, 0.06) if filled else None
        self.items.append(("box", tuple(map(round, (x0, y0, x1, y1))), mix(style.ground, style.key_color, 0.55), fill))

    def put_title(self, title):
        """At the page's head, plain or on a bar; returns where the fields may begin."""
        font, style = self.title_font, self.style
        width, height = font.getlength(title), sum(font.getmetrics())
        x = (SIDE - width) / 2 if style.centered else EDGE + 30 * style.left
        color = style.key_color
        if style.bar:
            self.items.append(("bar", (0, 0, SIDE, height + 4), color))
            color = style.ground
        self.items.append(("text", (round(x), 2), title, font, color))
        return height + 8

    def rows(self, n, least, most_air=14):
        """n rows of at least `least` pixels below the title: (top of the first, pitch), with the style's free space."""
        free = SIDE - EDGE - self.start - n * least
        pitch = least + min(most_air, max(0, free) / n) * self.style.air
        slack = max(0, SIDE - EDGE - self.start - n * pitch)
        self.fits &= free >= 0
        return self.start + slack * self.style.top * 0.8, pitch

    def left(self, width):
        """Left edge of a block of this width."""
        return EDGE + max(0, min(SIDE - 2 * EDGE - width, 40)) * self.style.left

    def draw(self):
        style = self.style
        image = Image.new("RGB", (SIDE, SIDE), style.ground)
        draw = ImageDraw.Draw(image)
        if style.framed:
            draw.rectangle((2, 2, SIDE - 3, SIDE - 3), outline=mix(style.ground, style.key_color, 0.5))
        for kind, at, *rest in self.items:
            if kind == "text":
                string, font, color = rest
                draw.text(at, string, font=font, fill=color)
            elif kind == "line":
                draw.line(at, fill=rest[0])
            else:
                draw.rectangle(at, outline=rest[0], fill=rest[0] if kind == "bar" else rest[1])
        for at in style.specks:
            draw.point(at, fill=mix(style.ground, style.key_color, 0.6))
        return image


def lines(page):
    """KEY: value, the values right behind the keys or in a column of their own."""
    n, style = len(page.keys), page.style
    gap = 7 + 7 * style.jitter[0]
    column = max(page.key_width(i) for i in range(n)) if style.dotted else 0
    widths = [max(column, page.key_width(i)) + gap + page.value_width(i) for i in range(n)]
    x = page.left(max(widths))
    y, pitch = page.rows(n, page.line + (2 if style.rule != "none" else 0))
    for i in range(n):
        page.key(i, x, y)
        page.value(i, x + max(column, page.key_width(i)) + gap, y)
        page.stroke(x, y + page.line, SIDE - 20, style.rule)
        y += pitch


def leaders(page):
    """Key at the left, value at the right, as on receipts, with or without dots between them."""
    n, style = len(page.keys), page.style
    x0, x1 = EDGE + 22 * style.left, SIDE - EDGE - 22 * style.jitter[0]
    y, pitch = page.rows(n, page.line + 1)
    for i in range(n):
        begin, end = x0 + page.key_width(i), x1 - page.value_width(i)
        page.fits &= end - begin >= 8
        page.key(i, x0, y)
        page.value(i, end, y)
        if style.dotted:
            page.stroke(begin + 4, y + page.line - 4, end - 4, "dotted", 0.4)
        page.stroke(x0, y + page.line, x1, style.rule)
        y += pitch


def table(page):
    """Two ruled columns."""
    n, style = len(page.keys), page.style
    first = max(page.key_width(i) for i in range(n)) + 8
    width = first + max(page.value_width(i) for i in range(n)) + 10
    width += (SIDE - 2 * EDGE - width) * style.jitter[0] if width < SIDE - 2 * EDGE else 0
    x = page.left(width)
    y, pitch = page.rows(n, page.line + 1, 12)
    for i in range(n):
        page.box(x, y, x + width, y + pitch, style.banded and i % 2)
        page.box(x, y, x + first, y + pitch, style.banded and i % 2)
        page.key(i, x + 3, y + 1)
        page.value(i, x + first + 4, y + 1)
        y += pitch


def stacked(page):
    """Each value under its key, boxed or not."""
    n, style = len(page.keys), page.style
    x = EDGE + 34 * style.left
    y, pitch = page.rows(n, 2 * page.line + 3, 10)
    for i in range(n):
        if style.rule != "none":
            page.box(x - 2, y, SIDE - 14, y + pitch - 2, style.banded)
        page.key(i, x, y)
        page.value(i, x + (8 if style.jitter[i] < 0.3 else 0), y + page.line)
        y += pitch


def halves(page):
    """Two columns of KEY: value, filled downwards."""
    n, style = len(page.keys), page.style
    rows = (n + 1) // 2
    gap = 7 + 4 * style.jitter[0]
    width = max(page.key_width(i) + gap + page.value_width(i) for i in range(rows))
    columns = EDGE, max(SIDE / 2, EDGE + width + 10)
    y0, pitch = page.rows(rows, page.line + 2)
    for i in range(n):
        x, y = columns[i // rows], y0 + i % rows * pitch
        page.key(i, x, y)
        page.value(i, x + page.key_width(i) + gap, y)
        if style.rule != "none" and i < rows:
            page.stroke(EDGE, y + page.line, SIDE - 16, style.rule)


def cards(page):
    """Two columns, each value under its key, filled row by row."""
    n, style = len(page.keys), page.style
    rows = (n + 1) // 2
    half = SIDE / 2 - EDGE - 4
    y0, pitch = page.rows(rows, 2 * page.line + 4, 10)
    for i in range(n):
        x, y = EDGE + 2 + i % 2 * (half + 4), y0 + i // 2 * pitch
        indent = 8 if style.jitter[i] < 0.3 else 0
        page.fits &= max(page.key_width(i), page.value_width(i) + indent) <= half - 6
        if style.rule != "none":
            page.box(x - 2, y, x + half - 2, y + pitch - 3, style.banded)
        page.key(i, x, y)
        page.value(i, x + indent, y + page.line)


def scattered(page):
    """KEY: value lines, each beginning somewhere else."""
    n, style = len(page.keys), page.style
    gap = 7 + 6 * style.jitter[15]
    y, pitch = page.rows(n, page.line + 1)
    for i in range(n):
        width = page.key_width(i) + gap + page.value_width(i)
        x = EDGE + max(0, SIDE - 2 * EDGE - width) * style.jitter[i]
        page.key(i, x, y)
        page.value(i, x + page.key_width(i) + gap, y)
        y += pitch


LAYOUTS = {f.__name__: f for f in (lines, leaders, table, stacked, halves, cards, scattered)}


def draw_page(rng, fonts, fields, title, layouts=None):
    """The page as an image: the style's layout at the largest size up to the style's that fits, else another layout."""
    style = Style(rng)
    order = sorted(layouts or LAYOUTS)
    rng.shuffle(order)
    if style.layout in order:
        order.insert(0, style.layout)
    for name in order:
        for size in range(style.size, SMALLEST - 1, -1):
            page = Page(fonts, style, fields, title, size)
            LAYOUTS[name](page)
            if page.fits:
                return page.draw()
    raise SystemExit(f"a page of {len(fields)} fields fits in no layout")
