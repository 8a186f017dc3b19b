"""What stands on the pages that make_pages.py draws: titles, field names and values, all from the closed vocabulary
that the demo model was trained on (names that its dev-eval and its tokenizer show). Every choice comes from the random
generator that the caller passes, and none from a font's size, so a seed gives the same texts on every machine."""

FIELDS = {
    "price": "TOTAL,SUBTOTAL,TAX,TIP,FEE,FARE,COST,PRICE,UNIT PRICE,BALANCE,DEPOSIT,REFUND,DEBIT,CREDIT,RENT,SALARY,"
             "WAGE,BONUS,BUDGET,TOLL,CASH,CHANGE,PAID,DUE,LOAN,AMOUNT",
    "date": "DATE,ORDER DATE,DUE DATE,ISSUED,EXPIRES,BIRTH,SIGNED,SHIPPED,ORDERED,RENEWAL,CHECKIN,CHECKOUT,ARRIVAL,"
            "DEPARTURE,DELIVERY",
    "time": "OPEN,CLOSE,START,END,BREAK,BOARDING,LANDING,PICKUP,ALARM,SHIFT,SESSION,TIME",
    "number": "AGE,COUNT,DAYS,DESK,FLOOR,LANE,PAGE,PIN,POINTS,QTY,ROOM,SCORE,STOCK,TABLE,UNITS,UNIT,YEAR,ZIP,BOX",
    "code": "ACCOUNT,BATCH,CARD,CLAIM,CODE,FLIGHT,GATE,INVOICE,INVOICE NO,LICENSE,LOCKER,LOT,MODEL,ORDER,ORDER NO,"
            "PART NO,PERMIT,PLATE,POLICY,REF,ROUTE,SEAT,SERIAL,SKU,TICKET,TRACKING",
    "phone": "FAX,HELPLINE,MOBILE,PHONE",
    "percent": "DISCOUNT,INTEREST,MARGIN,RATE,TAX RATE",
    "quantity": "DEPTH,DOSE,ENERGY,HEIGHT,LENGTH,POWER,SPEED,VOLUME,WEIGHT,WIDTH,NET WEIGHT",
    "person": "AGENT,AUTHOR,BUYER,CASHIER,CLIENT,DOCTOR,DRIVER,GUEST,MANAGER,NAME,FIRST NAME,LAST NAME,NURSE,OWNER,"
              "PATIENT,PILOT,SELLER,SENDER,STUDENT,TEACHER,TENANT,WITNESS",
    "city": "BRANCH,CAMPUS,DEST,FROM,ORIGIN,PORT,REGION,STATION,VENUE",
    "state": "CLASS,GRADE,LEVEL,METHOD,MODE,PRIORITY,RESULT,STATE,STATUS,TYPE",
    "thing": "BRAND,CATEGORY,COLOR,DEPT,FLAVOR,ITEM,MATERIAL,PRODUCT,SUBJECT",
}
KIND = {name: kind for kind, names in FIELDS.items() for name in names.split(",")}

TITLES = ("GREEN MARKET,SPORT CLUB,PARKING TICKET,CERTIFICATE,MEMBER CARD,RECEIPT,CITY BANK,AUTO REPAIR,REPORT,"
          "POST OFFICE,SUMMARY,MEDICAL RECORD,BOARDING PASS,ID CARD,NORTH SCHOOL,HOTEL PLAZA,SHIPPING LABEL,"
          "STATEMENT,DELIVERY NOTE,RENTAL AGREEMENT,CENTRAL CLINIC,INVOICE FORM").split(",")

WORDS = {
    "first": "Alice,Anna,Bruno,Clara,David,Diana,Emma,Erik,Felix,Frank,Greta,Helen,Hugo,Irene,Ivan,Jonas,Karen,"
             "Laura,Lucas,Maria,Nina,Oscar,Paula,Peter,Ralph,Sara,Simon,Tom,Vera,Walter",
    "last": "Baker,Brown,Carter,Clark,Evans,Fisher,Green,Hill,Jones,King,Lee,Mason,Parker,Reed,Smith,Stone,Turner,"
            "Walker,Young",
    "city": "Athens,Berlin,Boston,Cairo,Chicago,Dallas,Delhi,Denver,Dublin,Havana,Lima,Lisbon,London,Madrid,Milan,"
            "Oslo,Paris,Prague,Quito,Rome,Seattle,Sydney,Tokyo,Toronto,Vienna",
    "state": "Active,Auto,Basic,Closed,Failed,Fair,First,Good,High,Late,Low,Manual,Medium,Normal,Open,Paid,Passed,"
             "Pending,Poor,Ready,Second,Shipped,Third,Urgent",
    "thing": "Apple,Biology,Black,Blue,Bottle,Bread,Camera,Chair,Cherry,Coffee,Cotton,Finance,Garden,Glass,Gold,"
             "Green,Guitar,History,Honey,Jacket,Lamp,Laptop,Leather,Legal,Lemon,Math,Milk,Mint,Music,Paper,Pencil,"
             "Phone,Physics,Red,Rice,Sales,Salt,Shoes,Silver,Steel,Sugar,Support,Tea,Vanilla,Watch,White,Wood,Wool",
    "month": "Jan,Feb,Mar,Apr,May,Jun,Jul,Aug,Sep,Oct,Nov,Dec",
    "unit": "g,kg,mm,cm,m,km,ml,L,W,kW",
}
WORDS = {kind: words.split(",") for kind, words in WORDS.items()}
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # those of the codes in dev-eval: the model misreads vowels there


def digits(rng, n):
    """n digits, the first not a zero."""
    return str(rng.randrange(10 ** (n - 1), 10 ** n))


def price(rng):
    return rng.choice(["", "$"]) + digits(rng, rng.randint(1, 4)) + f".{rng.randrange(100):02d}"


def date(rng):
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2039)
    return rng.choice([f"{day:02d}/{month:02d}/{year}", f"{year}-{month:02d}-{day:02d}",
                       f"{day:02d}.{month:02d}.{year % 100:02d}", f"{day:02d} {WORDS['month'][month - 1]} {year}"])


def code(rng):
    def letters(n):
        return "".join(rng.choice(LETTERS) for _ in range(n))
    return rng.choice([lambda: letters(3) + digits(rng, 3), lambda: letters(2) + "-" + digits(rng, rng.randint(3, 5)),
                       lambda: digits(rng, 2) + "-" + letters(2), lambda: letters(1) + digits(rng, rng.randint(3, 5)),
                       lambda: digits(rng, 3) + "-" + digits(rng, rng.randint(3, 4))])()


def quantity(rng):
    if rng.random() < 0.6:
        amount = digits(rng, rng.randint(1, 3))
    else:
        amount = digits(rng, rng.randint(1, 2)) + f".{rng.randrange(10)}"
    return f"{amount} {rng.choice(WORDS['unit'])}"


def person(rng):
    first = rng.choice(WORDS["first"])
    return first if rng.random() < 0.35 else f"{first} {rng.choice(WORDS['last'])}"


def thing(rng):
    return " ".join(rng.sample(WORDS["thing"], 1 if rng.random() < 0.7 else 2))


VALUES = {
    "price": price, "date": date, "code": code, "quantity": quantity, "person": person, "thing": thing,
    "time": lambda rng: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}",
    "number": lambda rng: digits(rng, rng.randint(1, 6)),
    "phone": lambda rng: f"555-{rng.randrange(10000):04d}",
    "percent": lambda rng: digits(rng, 1) + rng.choice(["", f".{rng.randrange(10)}"]) + "%",
    "city": lambda rng: rng.choice(WORDS["city"]),
    "state": lambda rng: rng.choice(WORDS["state"]),
}


def value_of(rng, name):
    """Mostly of the field's own kind; sometimes of any, so that the name does not tell the value's form."""
    return VALUES[KIND[name] if rng.random() < 0.85 else rng.choice(sorted(VALUES))](rng)


def fields(rng, n):
    """n (name, value) pairs; no name and no value stands twice on a page."""
    page, used = [], set()
    for name in rng.sample(sorted(KIND), n):
        value = value_of(rng, name)
        while value in used:
            value = value_of(rng, name)
        used.add(value)
        page.append((name, value))
    return page


def answer_tokens(value):
    """Tokens of the value as the demo model's answer, </s> included: digits, signs and the letters of codes one by one,
    words and units whole, and one for the space before a digit or sign. Two letters of a code may be one token."""
    if not any(c.isdigit() for c in value):
        return len(value.split()) + 1
    whole = WORDS["unit"] + WORDS["month"]
    return 1 + sum(1 if word in whole else len(word) + (not word[0].isalpha()) for word in value.split())


def is_long(value):
    """The answers that show what a cache kept: the model card counts those of five tokens or more."""
    return answer_tokens(value) >= 5
