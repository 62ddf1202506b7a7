"use strict";
// Everything works without this file, but for scans: it adds keys.
const typing = (target) => target.closest("input, textarea, select") !== null;

function move(step) {
  const links = [...document.querySelectorAll("[data-tiles] figcaption a")];
  if (!links.length) return;
  const at = links.indexOf(document.activeElement);
  const next = links[Math.min(links.length - 1, Math.max(0, at < 0 ? (step > 0 ? 0 : links.length - 1) : at + step))];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  const keys = {
    "/": () => document.getElementById("q")?.focus(),
    j: () => move(1),
    k: () => move(-1),
    n: () => document.querySelector("[data-next]")?.click(),
    u: () => document.querySelectorAll(".veil input").forEach((box) => { box.checked = true; }),
  };
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});

const form = document.querySelector("[data-scan]");
if (form) {
  const said = document.querySelector("[data-said]");
  const list = document.querySelector("[data-found]");
  const stop = document.querySelector("[data-stop]");
  let controller = null;

  const show = (ids) => {
    for (const id of ids) {
      const item = document.createElement("li");
      const link = document.createElement("a");
      const image = document.createElement("img");
      link.href = `/image/${id}`;
      link.className = "frame";
      image.src = `/api/images/${id}/thumbnail`;
      image.alt = `image ${id}`;
      image.className = "thumb";
      image.loading = "lazy";
      link.append(image);
      const figure = document.createElement("figure");
      figure.className = "tile";
      const caption = document.createElement("figcaption");
      caption.textContent = id;
      figure.append(link, caption);
      item.append(figure);
      list.append(item);
    }
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    controller?.abort();
    controller = new AbortController();
    list.replaceChildren();
    stop.hidden = false;
    let found = 0;
    try {
      const query = new URLSearchParams(new FormData(form));
      const answer = await fetch(`/api/scan?${query}`, { signal: controller.signal });
      if (!answer.ok) {
        said.textContent = answer.status === 409 ? "Another scan is under way: wait for it, or cancel it." : `Refused (${answer.status}).`;
        return;
      }
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          const told = JSON.parse(line);
          if (told.found) { found += told.found.length; show(told.found); }
          if (told.of !== undefined) {
            const ends = { complete: "all rows read", cancelled: "cancelled", enough: "stopped at this many" };
            said.textContent = `${found.toLocaleString("en")} found, ${told.rows.toLocaleString("en")} of ${told.of.toLocaleString("en")} rows read${told.done ? `: ${ends[told.done]}` : "…"}`;
          }
        }
      }
    } catch (error) {
      said.textContent = error.name === "AbortError" ? "Cancelled." : "The connection was lost.";
    } finally {
      stop.hidden = true;
    }
  });
  stop.addEventListener("click", async () => {
    await fetch("/api/scan", { method: "DELETE" });
  });
}
