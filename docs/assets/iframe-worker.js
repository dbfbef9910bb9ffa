// Browsers start no workers for pages opened from the disk. There, the search runs in a hidden frame: what is
// posted to the worker is an event in the frame's window, and what the frame posts is an event at the worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.deliver = (data) => inside.dispatchEvent(new MessageEvent("message", { data }));
      this.waiting = []; // until the script has run
      const script = inside.document.createElement("script");
      script.src = url;
      script.onload = () => {
        this.waiting.forEach(this.deliver);
        this.waiting = null;
      };
      inside.document.body.append(script);
    }
    postMessage(data) {
      this.waiting ? this.waiting.push(data) : this.deliver(data);
    }
    terminate() {}
  };
}
