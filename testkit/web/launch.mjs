// Headless Chromium with fake devices, able to gather a loopback candidate.
import { load } from "./modules.mjs";

const { chromium } = (await load("playwright-core")).default;

export function launch(executable) {
  return chromium.launch({
    executablePath: executable,
    headless: true,
    args: [
      "--headless=new",
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      // A page in the background must go on encoding and decoding.
      "--disable-background-timer-throttling",
      "--disable-backgrounding-occluded-windows",
      "--disable-renderer-backgrounding",
      "--use-fake-device-for-media-stream",
      "--use-fake-ui-for-media-stream",
      "--autoplay-policy=no-user-gesture-required",
      // 127.0.0.1 is gathered only with this switch and a granted microphone or the policy of the next line.
      "--allow-loopback-in-peer-connection",
      "--force-webrtc-ip-handling-policy=default",
      "--disable-features=WebRtcHideLocalIpsWithMdns,OptimizationHints,MediaRouter,Translate",
    ],
    ignoreDefaultArgs: ["--headless"],
  });
}

// Every page has its own context: its own storage, its own login.
export async function openPage(browser, log) {
  const context = await browser.newContext({
    ignoreHTTPSErrors: true,
    permissions: ["microphone", "camera"],
    viewport: { width: 1000, height: 700 },
  });
  const page = await context.newPage();
  page.setDefaultTimeout(40_000);
  page.on("console", (message) => log(`${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => log(`uncaught: ${error}`));
  page.on("crash", () => log("the page crashed"));
  return page;
}
