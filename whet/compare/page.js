"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const list = document.getElementById("list");
const which = document.getElementById("which");

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function shown(problem) {
  if (which.value === "changed") return new Set(problem.right).size > 1;
  if (which.value === "wrong") return !problem.right.at(-1);
  return true;
}

function draw() {
  list.replaceChildren();
  const chosen = data.problems.filter(shown);
  document.getElementById("count").textContent = `${chosen.length} of ${data.problems.length}`;
  for (const problem of chosen) {
    const article = element("article", "", "");
    article.append(element("p", "question", problem.question));
    const replies = element("div", "replies", "");
    problem.replies.forEach((reply, i) => {
      const box = element("div", "", "");
      const right = problem.right[i];
      const verdict = `${data.models[i]}: ${right ? "✓ right" : "✗ wrong"}`;
      box.append(element("p", `verdict ${right ? "right" : "wrong"}`, verdict));
      box.append(element("p", "reply", reply || "(nothing)"));
      replies.append(box);
    });
    article.append(replies);
    list.append(article);
  }
}

if (data.problems.length === 0) document.getElementById("replies").hidden = true;
which.addEventListener("change", draw);
draw();
