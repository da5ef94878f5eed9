// Headless Firefox over WebDriver BiDi, which stock builds speak, with as much of playwright's interface as the driver
// uses. Fake devices, and able to gather a loopback candidate.
import { spawn } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

const preferences = {
  "app.update.disabledForTesting": true,
  "browser.shell.checkDefaultBrowser": false,
  "datareporting.policy.dataSubmissionEnabled": false,
  "toolkit.telemetry.reportingpolicy.firstRun": false,
  // 127.0.0.1 is gathered only with this, and by its name only without the other.
  "media.peerconnection.ice.loopback": true,
  "media.peerconnection.ice.obfuscate_host_addresses": false,
  // A tone and a picture instead of devices, and nobody to ask.
  "media.navigator.streams.fake": true,
  "media.navigator.permission.disabled": true,
  // Without a permission, fake devices in use don't count: only the address of the default route is gathered.
  "permissions.default.microphone": 1,
  "permissions.default.camera": 1,
  "media.autoplay.default": 0,
  "media.gmp-manager.updateEnabled": false,
};

export async function launch(executable) {
  const profile = await mkdtemp(join(tmpdir(), "firefox-"));
  const lines = Object.entries(preferences).map(([name, value]) => `user_pref("${name}", ${JSON.stringify(value)});\n`);
  await writeFile(join(profile, "user.js"), lines.join(""));
  const options = ["--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0", "about:blank"];
  const child = spawn(executable, options, { stdio: ["ignore", "inherit", "pipe"] });
  const address = await new Promise((found, failed) => {
    child.once("exit", (code) => failed(new Error(`Firefox ended with ${code}`)));
    createInterface({ input: child.stderr }).on("line", (line) => {
      process.stderr.write(`${line}\n`);
      const [, url] = line.match(/WebDriver BiDi listening on (ws:\S+)/) ?? [];
      if (url) found(`${url}/session`);
    });
  });
  const socket = new WebSocket(address);
  await new Promise((open, failed) => Object.assign(socket, { onopen: open, onerror: failed }));
  const waiting = new Map();
  const logs = new Map();
  let next = 1;
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.method === "log.entryAdded")
      logs.get(message.params.source.context)?.(`${message.params.level}: ${message.params.text}`);
    const [done, failed] = waiting.get(message.id) ?? [];
    waiting.delete(message.id);
    if (message.type === "error") failed?.(new Error(`${message.error}: ${message.message}`));
    else done?.(message.result);
  };
  const call = (method, params) =>
    new Promise((done, failed) => {
      waiting.set(next, [done, failed]);
      socket.send(JSON.stringify({ id: next++, method, params }));
    });
  const { capabilities } = await call("session.new", { capabilities: {} });
  await call("session.subscribe", { events: ["log.entryAdded"] });
  return {
    call,
    logs,
    version: () => capabilities.browserVersion,
    close: async () => {
      const gone = new Promise((done) => child.once("exit", done));
      child.kill("SIGKILL");
      await gone;
      await rm(profile, { recursive: true, force: true });
    },
  };
}

// Every page has a user context of its own: its own storage, its own login.
export async function openPage({ call, logs }, log) {
  const { userContext } = await call("browser.createUserContext", {});
  const { context } = await call("browsingContext.create", { type: "tab", userContext });
  logs.set(context, log);
  return {
    goto: (url) => call("browsingContext.navigate", { context, url, wait: "complete" }),
    evaluate: async (made, argument) => {
      const outcome = await call("script.callFunction", {
        functionDeclaration: `async (text) => JSON.stringify((await (${made})(JSON.parse(text))) ?? null)`,
        arguments: [{ type: "string", value: JSON.stringify(argument ?? null) }],
        target: { context },
        awaitPromise: true,
      });
      if (outcome.type === "exception") throw new Error(outcome.exceptionDetails.text);
      return JSON.parse(outcome.result.value);
    },
    context: () => ({ close: () => call("browser.removeUserContext", { userContext }) }),
  };
}
