/* child_program.c: agent/native/child.c on a shell script, for test_child.py.
 *
 *   child_program LIMIT_S STOP_FILE default|ignore SCRIPT
 *
 * The script gets "input\n". STOP_FILE: the caller wants to stop once it is there. `ignore`: SIGCHLD is ignored. Prints
 * what the script said and whether a process of it is still to be waited for.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../agent/native/child.h"
#include "../../sti_runtime/native/json.h"

static const char *stop_file;
static bool stopped(void) { return access(stop_file, F_OK) == 0; }

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  char *const words[] = {(char *)"sh", (char *)"-c", argv[4], NULL};
  Command command = {"/bin/sh", words};
  Text input = {0}, out = {0};
  Said said = {.status = -1};
  StiError error = {0};
  stop_file = argv[2];
  signal(SIGPIPE, SIG_IGN);
  signal(SIGCHLD, strcmp(argv[3], "ignore") == 0 ? SIG_IGN : SIG_DFL);
  text_append(&input, "input\n", 6);
  StiCode code = child_run(&command, &input, atoi(argv[1]), stopped, &said, &error);
  json_open(&out, '{');
  json_text_field(&out, "error", sti_error_name(code));
  json_bool_field(&out, "left", waitpid(-1, NULL, WNOHANG) >= 0);
  json_text_field(&out, "out", said.out.length > 0 ? said.out.data : "");
  json_text_field(&out, "remedy", error.remedy);
  json_int_field(&out, "status", said.status);
  json_text_field(&out, "what", error.what);
  json_text_field(&out, "words", said.words.length > 0 ? said.words.data : "");
  json_close(&out, '}');
  printf("%s\n", out.data);
  text_free(&input);
  text_free(&out);
  text_free(&said.out);
  text_free(&said.words);
  return 0;
}
