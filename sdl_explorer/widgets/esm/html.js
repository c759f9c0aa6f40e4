// The markup comes from our own views, which escape what comes from data.
export function render({ model, el }) {
  const node = document.createElement("div")
  const draw = () => { node.innerHTML = model.html }
  const pick = (event) => {
    const target = event.target.closest("[data-pick]")
    if (target) { model.send_msg({ pick: target.dataset.pick }) }
  }
  node.addEventListener("click", pick)
  model.on("html", draw)
  draw()
  el.append(node)
}
