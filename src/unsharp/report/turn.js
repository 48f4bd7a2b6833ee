"use strict";
// Loss surfaces to turn: drawn while they are in view, the networks of a set by one camera. Nothing moves by itself.
(() => {
  const START = { x: 1.5, y: -1.7, z: 1 }, STEP = Math.PI / 12;
  const boxes = [...document.querySelectorAll(".turning")];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const able = () => {
    const gl = document.createElement("canvas").getContext("webgl");
    gl?.getExtension("WEBGL_lose_context")?.loseContext();
    return gl !== null;
  };

  const give_up = (box) => {
    box.querySelector(".views").remove();
    box.querySelector(".controls").remove();
    box.querySelector(".how").remove();
    box.querySelector(".unable").hidden = false;
  };

  /** Where the camera stands after a step to the side and up, in radians, at a distance times a factor. */
  const moved = ({ x, y, z }, side, up, factor) => {
    const distance = Math.min(5, Math.max(0.9, Math.hypot(x, y, z) * factor));
    const around = Math.atan2(y, x) + side;
    const height = Math.min(1.5, Math.max(-1.5, Math.atan2(z, Math.hypot(x, y)) + up));
    const flat = distance * Math.cos(height);
    return { x: flat * Math.cos(around), y: flat * Math.sin(around), z: distance * Math.sin(height) };
  };

  const camera_at = (eye) => ({ eye: { ...eye }, center: { x: 0, y: 0, z: -0.1 }, up: { x: 0, y: 0, z: 1 } });

  /** Each colour for a step of the heights, without a way from one to the next. */
  const stepped = (bands) => bands.flatMap((c, i) => [[i / bands.length, c], [(i + 1) / bands.length, c]]);

  const trace_of = (data, { heights, losses }) => ({
    type: "surface", x: data.axis, y: data.axis, z: heights, text: losses, cmin: 0, cmax: 1, showscale: false,
    colorscale: stepped(data.bands), connectgaps: false,
    lighting: { ambient: 0.8, diffuse: 0.45, specular: 0.04, roughness: 0.9 },
    contours: { x: { highlight: false }, y: { highlight: false }, z: { highlight: false } },
    hovertemplate: "loss %{text}<br>at %{x:.2f}, %{y:.2f}<extra></extra>",
  });

  const layout_of = (data, camera) => {
    const ink = variable("--muted"), line = variable("--line"), ends = [data.axis[0], 0, data.axis.at(-1)];
    const axis = (text, more) => ({
      title: { text }, color: ink, gridcolor: line, linecolor: line, zeroline: false, showbackground: false,
      showspikes: false, ...more,
    });
    return {
      margin: { l: 0, r: 0, t: 0, b: 0 }, paper_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { family: "system-ui, sans-serif", size: 10, color: ink },
      scene: {
        camera, dragmode: "turntable", aspectmode: "manual", aspectratio: { x: 1.05, y: 1.05, z: 0.8 },
        xaxis: axis("first", { tickvals: ends }), yaxis: axis("second", { tickvals: ends }),
        zaxis: axis("loss", { range: [-0.02, 1.02], tickvals: data.ticks.map((t) => t[0]), ticktext: data.ticks.map((t) => t[1]) }),
      },
    };
  };

  const prepare = (box) => {
    const data = JSON.parse(box.querySelector("script").textContent), scenes = [...box.querySelectorAll(".scene")];
    let eye = START, drawn = false, wanted = null, following = false;

    /** Bring all scenes but one to a camera; of many in a row only the last counts. */
    const follow = async (to, but) => {
      wanted = { to, but };
      if (following) return;
      following = true;
      try {
        while (wanted) {
          const { to: next, but: leader } = wanted;
          wanted = null;
          eye = { ...next };
          const others = scenes.filter((scene) => scene !== leader);
          await Promise.all(others.map((scene) => Plotly.relayout(scene, { "scene.camera": camera_at(eye) })));
        }
      } finally {
        following = false;
      }
    };

    /** What a scene says when it was turned, which it also says of being brought to the camera of another. */
    const heard = (change, scene) => {
      const to = change["scene.camera"]?.eye;
      if (to && ["x", "y", "z"].some((axis) => to[axis] !== eye[axis])) follow(to, scene);
    };

    // On a slow machine a scene turns on after the hand has let go, and has not said so.
    let held = false;
    box.addEventListener("pointerdown", () => (held = true));
    window.addEventListener("pointerup", () => {
      if (held) setTimeout(() => box.dataset.drawn === "yes" && follow(eye, null), 300);
      held = false;
    });

    const draw = async () => {
      if (drawn) return;
      drawn = true;
      try {
        for (const [i, scene] of scenes.entries()) {
          const options = { displayModeBar: false, responsive: true, scrollZoom: false };
          await Plotly.newPlot(scene, [trace_of(data, data.networks[i])], layout_of(data, camera_at(eye)), options);
          for (const turned of ["plotly_relayouting", "plotly_relayout"])
            scene.on(turned, (change) => heard(change, scene));
        }
        box.dataset.drawn = "yes";
      } catch {
        give_up(box);
      }
    };

    const clear = () => {
      if (box.dataset.drawn !== "yes") return;
      drawn = false;
      delete box.dataset.drawn;
      scenes.forEach((scene) => Plotly.purge(scene));
    };

    box.querySelector(".controls").addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (!button || box.dataset.drawn !== "yes") return;
      const { side = 0, up = 0, factor = 1 } = button.dataset;
      follow("start" in button.dataset ? START : moved(eye, side * STEP, up * STEP, Number(factor)));
    });
    dark.addEventListener("change", () => {
      if (box.dataset.drawn !== "yes") return;
      clear();
      draw();
    });
    // A browser keeps few drawings of this kind at a time, so those out of view are given back.
    const look = (seen) => (seen.at(-1).isIntersecting ? draw() : clear());
    new IntersectionObserver(look, { rootMargin: "150px" }).observe(box);
  };

  if (!boxes.length) return;
  const possible = able();
  for (const box of boxes) {
    box.hidden = false;
    if (possible) prepare(box);
    else give_up(box);
  }
})();
