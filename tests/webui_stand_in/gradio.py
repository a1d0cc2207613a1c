"""What of gradio webui's Model tab needs to be built: components with a label, a value and a parent."""

entered = []


class Block:
    """A component, or a column of them."""

    def __init__(self, label="", value=None, info="", **rest):
        self.label, self.value, self.info, self.rest, self.children = label, value, info, rest, []
        self.parent = entered[-1] if entered else None
        if self.parent is not None:
            self.parent.children.append(self)

    def __enter__(self):
        self.parent = entered[-1] if entered else None
        entered.append(self)
        return self

    def __exit__(self, *_):
        entered.pop()


class Progress:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def __call__(self, share, desc=""):
        self.told.append((share, desc))


Textbox = Dropdown = Slider = Number = Column = Tab = Block
