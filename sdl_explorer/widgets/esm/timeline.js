// Commits as an ordered list of buttons; those off the current branch are ghosts.
export function render({ model, el }) {
  const list = document.createElement("ol")
  list.setAttribute("aria-label", "Timeline of commits")
  const draw = () => {
    const focused = list.getRootNode().activeElement?.dataset?.commit
    list.replaceChildren(...model.commits.map((commit) => {
      const item = document.createElement("li")
      const node = document.createElement("button")
      node.type = "button"
      node.dataset.commit = commit.id
      node.className = [commit.kind, commit.current ? "current" : "", commit.ghost ? "ghost" : ""].join(" ")
      node.textContent = `${commit.glyph} ${commit.step}`
      node.title = commit.label
      node.setAttribute("aria-label", commit.label)
      if (commit.current) { node.setAttribute("aria-current", "step") }
      node.setAttribute("aria-pressed", String(commit.id === model.picked))
      node.addEventListener("click", () => { model.send_msg({ commit: commit.id }) })
      item.append(node)
      return item
    }))
    if (focused) { list.querySelector(`[data-commit="${focused}"]`)?.focus() } else { list.scrollLeft = list.scrollWidth }
  }
  model.on("commits", draw)
  model.on("picked", draw)
  draw()
  el.append(list)
}
