// Buttons of a card: table twin, and a menu with what leaves the page (CSV, Python).
export function render({ model, el }) {
  const bar = document.createElement("div")
  bar.className = "bar"
  const button = (text, label, act) => {
    const node = document.createElement("button")
    node.type = "button"
    node.textContent = text
    node.setAttribute("aria-label", label)
    node.addEventListener("click", act)
    return node
  }
  const twin = button("Table", "", () => model.send_msg({ do: "table" }))
  const more = button("⋯", "", () => show(menu.hidden))
  more.setAttribute("aria-haspopup", "menu")
  const menu = document.createElement("div")
  menu.className = "menu"
  menu.hidden = true
  menu.setAttribute("role", "menu")
  const said = document.createElement("span")
  said.className = "said"
  said.setAttribute("role", "status")
  const entry = (text, what) => {
    const node = button(text, text, () => { show(false); more.focus(); model.send_msg({ do: what }) })
    node.setAttribute("role", "menuitem")
    return node
  }
  menu.append(entry("Download CSV", "csv"), entry("Copy as Python", "python"), entry("What am I looking at?", "about"))
  const show = (open) => {
    menu.hidden = !open
    more.setAttribute("aria-expanded", String(open))
    if (open) { menu.firstChild.focus() }
  }
  bar.addEventListener("keydown", (event) => {
    if (menu.hidden) { return }
    const items = [...menu.children], at = items.indexOf(event.target)
    if (event.key === "Escape") { event.stopPropagation(); show(false); more.focus() }
    if (event.key === "ArrowDown") { event.preventDefault(); event.stopPropagation(); items[(at + 1) % items.length].focus() }
    if (event.key === "ArrowUp") { event.preventDefault(); event.stopPropagation(); items[(at + items.length - 1) % items.length].focus() }
  })
  bar.addEventListener("focusout", (event) => { if (!bar.contains(event.relatedTarget)) { show(false) } })
  const draw = () => {
    twin.setAttribute("aria-label", `${model.twin ? "Hide" : "Show"} the table of: ${model.label}`)
    twin.setAttribute("aria-pressed", String(model.twin))
    more.setAttribute("aria-label", `More about: ${model.label}`)
  }
  const say = (text) => { said.textContent = text; setTimeout(() => { said.textContent = "" }, 2500) }
  model.on("msg:custom", async (event) => {
    const msg = event.data
    if (msg.csv !== undefined) {
      const link = document.createElement("a")
      link.href = URL.createObjectURL(new Blob([msg.csv], { type: "text/csv" }))
      link.download = msg.name
      link.click()
      URL.revokeObjectURL(link.href)
      say("Downloaded")
    }
    if (msg.python !== undefined) {
      try {
        await navigator.clipboard.writeText(msg.python)
        say("Copied")
      } catch (error) {
        const field = document.createElement("textarea")
        field.value = msg.python
        el.append(field)
        field.select()
        document.execCommand("copy")
        field.remove()
        say("Copied")
      }
    }
  })
  model.on("twin", draw)
  model.on("label", draw)
  draw()
  bar.append(said, twin, more, menu)
  el.append(bar)
}
