// Drives Chromium or Firefox for the Rust tests. Commands and answers are lines of JSON: see lines.mjs.
import { elementCallStats, joinElementCall, leaveElementCall, serveElementCall } from "./element-call.mjs";
import * as firefox from "./firefox.mjs";
import * as chromium from "./launch.mjs";
import { drive, until } from "./lines.mjs";
import { folder } from "./modules.mjs";
import { serve } from "./serve.mjs";

const here = import.meta.dirname;
const { createReadStream } = await import("node:fs");
const { launch, openPage } = process.env.ANTIPHON_FIREFOX ? firefox : chromium;
const browser = await launch(process.env.ANTIPHON_FIREFOX ?? process.env.ANTIPHON_CHROMIUM);
const livekitFiles = await serve(folder("livekit-client", "dist"), (_request, response, path) => {
  const file = { "/": "livekit.html", "/livekit.js": "livekit.js" }[path];
  if (!file) return false;
  response.setHeader("content-type", path === "/" ? "text/html" : "text/javascript");
  createReadStream(`${here}/${file}`).pipe(response);
  return true;
});
const meshFiles = await serve(here);
const pages = new Map();
let next = 1;

async function open() {
  const number = next++;
  const page = await openPage(browser, (line) => process.stderr.write(`page ${number}: ${line.slice(0, 2000)}\n`));
  pages.set(number, { page });
  return { number, page };
}

function at(number) {
  const entry = pages.get(number);
  if (!entry) throw new Error(`there is no page ${number}`);
  return entry;
}

async function close(number) {
  const { page, server } = at(number);
  pages.delete(number);
  await page.context().close();
  server?.close();
}

const inPage = (number, name, args) =>
  at(number).page.evaluate(([name, args]) => window.antiphon[name](args), [name, args]);

const commands = {
  "browser.version": () => browser.version(),
  // Every process of it at once: none has a chance to say good-bye to anybody.
  "browser.kill": async () => {
    const session = await browser.newBrowserCDPSession();
    const { processInfo } = await session.send("SystemInfo.getProcessInfo");
    const gone = new Promise((done) => browser.once("disconnected", done));
    // The browser itself is first in the list; the others end by themselves when they notice.
    for (const { id } of processInfo.sort((a, b) => (b.type === "browser") - (a.type === "browser")))
      try {
        process.kill(id, "SIGKILL");
      } catch (error) {
        if (error.code !== "ESRCH") throw error;
      }
    await gone;
  },
  "livekit.connect": async (args) => {
    const { number, page } = await open();
    await page.goto(`${livekitFiles.base}/`);
    await page.waitForFunction(() => window.antiphon, undefined, { polling: 100 });
    const joined = await inPage(number, "connect", args);
    return { page: number, ...joined, version: await page.evaluate(() => window.LivekitClient.version) };
  },
  "livekit.setKey": ({ page, ...args }) => inPage(page, "setKey", args),
  "livekit.setMuted": ({ page, ...args }) => inPage(page, "setMuted", args),
  "livekit.stats": ({ page }) => inPage(page, "stats"),
  "livekit.leave": async ({ page }) => {
    await inPage(page, "leave");
    await close(page);
  },
  "mesh.start": async (args) => {
    const { number, page } = await open();
    await page.goto(`${meshFiles.base}/mesh.html`);
    await until(() => page.evaluate(() => Boolean(window.antiphon)), 10_000, "the page's script");
    await inPage(number, "start", args);
    return { page: number };
  },
  "mesh.exchange": ({ page, ...args }) => inPage(page, "exchange", args),
  "mesh.stats": ({ page }) => inPage(page, "stats"),
  "mesh.publishLater": ({ page, ...args }) => inPage(page, "publishLater", args),
  "mesh.setMuted": ({ page, ...args }) => inPage(page, "setMuted", args),
  "mesh.sendData": ({ page, ...args }) => inPage(page, "sendData", args),
  "mesh.hangUp": ({ page }) => inPage(page, "hangUp"),
  "ec.join": async ({ homeserver, server_name, ...args }) => {
    const { number, page } = await open();
    const server = await serveElementCall(homeserver, server_name);
    at(number).server = server;
    return { page: number, ...(await joinElementCall(page, server.base, args)) };
  },
  "ec.stats": ({ page }) => elementCallStats(at(page).page),
  "ec.leave": ({ page }) => leaveElementCall(at(page).page),
  // Only the page goes: nothing in it has a chance to say good-bye.
  "ec.blank": ({ page }) => at(page).page.goto("about:blank").then(() => null),
  "page.screenshot": ({ page, file }) => at(page).page.screenshot({ path: file }).then(() => null),
  "page.close": ({ page }) => close(page),
};

drive(commands, () => browser.close());
