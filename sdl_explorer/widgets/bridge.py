"""ipywidgets that drive a session's settings, both ways."""


def link(widget, owner, name: str):
    """Tie `widget.value` to the parameter `owner.name` (a `Session`, its method, an `ExplorerState`), both ways.

        slider = ipywidgets.FloatLogSlider(min=-5, max=-1)
        link(slider, session, "lr")

    The widget takes the parameter's value now.
    A value that the parameter refuses is put back. Returns a function that cuts the tie.
    """
    if name not in owner.param:
        raise ValueError(
            f"link: {type(owner).__name__} has no setting {name!r}; it has {', '.join(n for n in owner.param if n != 'name')}."
        )

    def to_owner(change) -> None:
        try:
            setattr(owner, name, change["new"])
        except (ValueError, TypeError):
            widget.value = getattr(owner, name)
            raise

    def to_widget(event) -> None:
        if widget.value != event.new:
            widget.value = event.new

    widget.value = getattr(owner, name)
    widget.observe(to_owner, names="value")
    watcher = owner.param.watch(to_widget, name)

    def cut() -> None:
        widget.unobserve(to_owner, names="value")
        owner.param.unwatch(watcher)

    return cut
