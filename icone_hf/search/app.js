// Each part of the page that is HTML calls one of these when it is there. `trigger` tells the server.

function picker(element, trigger) {
  const input = element.querySelector("input");
  const said = element.querySelector(".said");
  const send = async (file) => {
    if (!file) return;
    if (file.size > 20e6) {
      said.textContent = `The image has ${(file.size / 1e6).toFixed(0)} MB, and the limit is 20.`;
      return;
    }
    said.textContent = "Looking at the image ...";
    try {
      const answer = await fetch("upload", { method: "POST", body: file });
      const told = await answer.json();
      said.textContent = answer.ok ? "" : told.error;
      if (answer.ok) trigger("upload", { kind: "own", id: told.token });
    } catch {
      said.textContent = "The image could not be sent: is the server still there?";
    }
  };
  input.addEventListener("change", () => {
    send(input.files[0]);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file) {
      event.preventDefault();
      send(file);
    }
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    send([...event.dataTransfer.files].find((one) => one.type.startsWith("image/")));
  });
}

function chips(element, trigger) {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-one]");
    if (!button) return;
    trigger("delete", { id: button.dataset.one });
    document.querySelector("#sentence textarea, #sentence input")?.focus();
  });
}

function results(element, trigger) {
  element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-id]");
    if (!button) return;
    const dialog = document.querySelector("dialog.details");
    dialog.innerHTML = '<p class="message" role="status">Looking at the image ...</p>';
    dialog.showModal();
    trigger("select", { id: button.dataset.id });
  });
}

function details(element, trigger, props, watch) {
  const dialog = document.createElement("dialog");
  dialog.className = "details";
  dialog.setAttribute("aria-label", "One image");
  element.closest(".gradio-container").append(dialog);
  watch("value", () => {
    if (!dialog.open) return;
    dialog.innerHTML = props.value ?? "";
    dialog.querySelector(".close")?.focus();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest(".close")) {
      dialog.close();
      return;
    }
    const button = event.target.closest("button[data-mark]");
    if (!button) return;
    dialog.close();
    trigger("like", { kind: button.dataset.mark, id: button.dataset.id });
  });
  dialog.addEventListener("change", (event) => {
    for (const layer of dialog.querySelectorAll(".layer")) {
      layer.hidden = layer.dataset.layer !== event.target.value;
    }
  });
}
