// Headless Chromium on the demo page, for its test and its benchmark.
//
// usage: node drive.mjs CHROMIUM URL < STEPS
//
// STEPS is a JSON list of [name, argument ...]; the answers come as one JSON list on standard output, with all addresses that
// were asked for and all messages on the console: { answers, requests, console }.

import { existsSync, readFileSync } from "node:fs";
import { text } from "node:stream/consumers";
import { chromium } from "playwright-core";

const [executablePath, url] = process.argv.slice(2);
const steps = JSON.parse(await text(process.stdin));

const browser = await chromium.launch({
  executablePath,
  // Without this Chromium refuses to run as root, as containers do.
  args: process.getuid?.() === 0 ? ["--no-sandbox"] : [],
});
const context = await browser.newContext({ viewport: { width: 1120, height: 1180 } });
const page = await context.newPage();
page.setDefaultTimeout(0); // who starts this sets the limit
const requests = [];
const said = [];
context.on("request", (request) => requests.push(request.url()));
page.on("console", (message) => said.push(`${message.type()}: ${message.text()}`));
page.on("pageerror", (error) => said.push(`error: ${error}`));

const evaluate = (name, values) => page.evaluate(([each, given]) => window.demo[each](...given), [name, values]);
const does = {
  open: async (query = "") => {
    await page.goto(url + query);
    return page.evaluate(() => window.demo.ready);
  },
  // Bytes that the page's process has had at most, all its workers included; where the system does not say, nothing.
  process: async () => {
    const session = await browser.newBrowserCDPSession();
    const { processInfo } = await session.send("SystemInfo.getProcessInfo");
    const pages = processInfo.filter(({ type }) => type === "renderer").map(({ id }) => `/proc/${id}/status`);
    const peaks = pages.filter(existsSync).map((file) => /VmHWM:\s+(\d+) kB/.exec(readFileSync(file, "utf8"))[1] * 1024);
    return peaks.length ? Math.max(...peaks) : undefined;
  },
  isolated: () => page.evaluate(() => crossOriginIsolated),
  fill: (selector, value) => page.fill(selector, value),
  select: (selector, value) => page.selectOption(selector, value, { force: true }),
  click: (selector) => page.click(selector),
  idle: () => page.evaluate(async () => void (await window.demo.idle())),
  texts: (selector) => page.locator(selector).allInnerTexts(),
  screenshot: async (path, colorScheme = "light") => {
    await page.emulateMedia({ colorScheme });
    await page.screenshot({ path, fullPage: true });
  },
  search: (...values) => evaluate("search", values),
  compare: (...values) => evaluate("compare", values),
  say: (...values) => evaluate("say", values),
  rows: () => page.evaluate(() => window.demo.rows()),
};

const answers = [];
try {
  for (const [name, ...values] of steps) answers.push((await does[name](...values)) ?? null);
} catch (error) {
  said.push(`error: ${error}`);
} finally {
  await browser.close();
}
console.log(JSON.stringify({ answers, requests, console: said }));
process.exitCode = answers.length === steps.length ? 0 : 1;
