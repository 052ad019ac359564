// Moving and scaling the graph by pointer, wheel and two fingers.

/** Drag, wheel and pinch. */
function pannable(canvas) {
  const touching = new Map();
  let dragged = false;
  const point = (event) => {
    const { left, top } = canvas.node.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };
  set(canvas.node, {
    on: {
      wheel: (event) => {
        event.preventDefault();
        const step = event.deltaMode === 1 ? 16 : 1;
        if (event.ctrlKey || event.metaKey) canvas.zoom(Math.exp(-event.deltaY * step * 0.006), ...point(event));
        else canvas.move(canvas.x - event.deltaX * step, canvas.y - event.deltaY * step);
      },
      pointerdown: (event) => {
        if (event.button !== 0) return;
        touching.set(event.pointerId, point(event));
        dragged = false;
      },
      pointermove: (event) => {
        const last = touching.get(event.pointerId);
        if (!last) return;
        const now = point(event);
        const far = Math.hypot(now[0] - last[0], now[1] - last[1]);
        if (!dragged && touching.size === 1 && far < 4) return; // a click may tremble
        if (!dragged) canvas.node.setPointerCapture(event.pointerId);
        dragged = true;
        const other = [...touching].find(([id]) => id !== event.pointerId)?.[1];
        if (other) {
          const ratio =
            Math.hypot(now[0] - other[0], now[1] - other[1]) /
            (Math.hypot(last[0] - other[0], last[1] - other[1]) || 1);
          canvas.zoom(ratio, (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
        } else {
          canvas.move(canvas.x + now[0] - last[0], canvas.y + now[1] - last[1]);
        }
        touching.set(event.pointerId, now);
      },
      pointerup: (event) => touching.delete(event.pointerId),
      pointercancel: (event) => touching.delete(event.pointerId),
    },
  });
  canvas.node.addEventListener(
    "click",
    (event) => {
      if (dragged) event.stopPropagation();
      dragged = false;
    },
    true,
  );
}
