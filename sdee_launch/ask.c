/* sdee-ask PYTHON -IS PROGRAM run|shell ARGUMENTS…: asks the daemon for the instance, then becomes
 * the interpreter, which takes longer to start than the daemon to make an instance.
 *
 * Only what is plain is asked: an option, file or variable that this program doesn't know is left
 * to sdee_launch/session.py. That one has the last word: it makes the request again and takes the
 * answer of this one only if both are the same, byte by byte (SDEE_ASKED: the descriptor of the
 * connection and the request). Nothing here is trusted by anybody; it runs with the user's rights.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SIZE 4096

/* What goes into JSON as it is. */
static int plain(const char *text)
{
    for (; *text; text++)
        if (*text < ' ' || *text > '~' || *text == '"' || *text == '\\')
            return 0;
    return 1;
}

static int one_of(const char *word, const char *const *words)
{
    for (; *words; words++)
        if (!strcmp(word, *words))
            return 1;
    return 0;
}

/* Whether a file of settings says anything, or may say it. */
static int has_settings(const char *path)
{
    FILE *file = fopen(path, "re");
    int c, start = 1, found = 0, comment = 0;

    if (!file)
        return 0;
    while (!found && (c = getc(file)) != EOF) {
        if (c == '\n')
            start = 1, comment = 0;
        else if (start && c == '#')
            comment = 1, start = 0;
        else if (!comment && !memchr(" \t\r\v\f", c, 5))
            found = 1;
    }
    fclose(file);
    return found;
}

static const char *variable(const char *name)
{
    const char *value = getenv(name);

    return value ? value : "";
}

/* The request for these arguments; 0 where it is for session.py to make. */
static int request(char **words, char *text)
{
    static const char *const engines[] = { "auto", "kernel", "fuse", NULL };
    static const char *const names[] = { "--env", "-e", "--engine", "--bind", NULL };
    const char *environment = "", *engine = "", *home = variable("HOME"), *site;
    char binds[SIZE / 2] = "", path[SIZE];
    int shell = !strcmp(*words++, "shell");

    for (; *words && **words == '-' && strcmp(*words, "-"); words++) {
        char name[16], *value = strchr(*words, '=');
        size_t length = value ? (size_t)(value - *words) : strlen(*words);

        if (!strcmp(*words, "--")) {
            words++;
            break;
        }
        if (length >= sizeof name)
            return 0;
        memcpy(name, *words, length);
        name[length] = 0;
        if (!one_of(name, names))
            return 0;
        value = value ? value + 1 : *++words;
        if (!value || !plain(value))
            return 0;
        if (!strcmp(name, "--engine")) {
            if (!one_of(value, engines))
                return 0;
            engine = value;
        } else if (!strcmp(name, "--bind")) {
            size_t used = strlen(binds);
            int more = snprintf(binds + used, sizeof binds - used, "%s\"%s\"", used ? "," : "", value);

            if (more < 0 || (size_t)more >= sizeof binds - used)
                return 0;
        } else
            environment = value;
    }
    if (shell == !!*words)
        return 0;
    if (*variable("SDEE_MODE") || !access("/run/sdee/inside", F_OK))
        return 0;
    if ((size_t)snprintf(path, sizeof path, "%s/.config/sdee/sdee.toml", home) >= sizeof path)
        return 0;
    if (has_settings(path))
        return 0;
    if (!*environment)
        environment = variable("SDEE_ENV");
    site = variable("SDEE_CONFIG");
    if (!*environment && has_settings(*site ? site : "/etc/sdee/sdee.toml"))
        return 0;
    if (!plain(environment))
        return 0;
    return snprintf(text, SIZE, "{\"op\":\"join\",\"env\":\"%s\",\"engine\":\"%s\",\"binds\":[%s]}",
                    *environment ? environment : "default", *engine ? engine : "auto", binds) < SIZE;
}

/* A connection to the daemon with the request on its way; -1 if anything would have to be waited for. */
static int ask(const char *text)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    const char *path = variable("SDEED_SOCKET");
    size_t length = strlen(text);
    unsigned char data[SIZE + 4] = { length >> 24, length >> 16, length >> 8, length };
    int fd, high;

    if (!*path)
        path = "/run/sdee/sdeed.sock";
    if (strlen(path) >= sizeof address.sun_path)
        return -1;
    strcpy(address.sun_path, path);
    memcpy(data + 4, text, length);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) ||
        send(fd, data, length + 4, MSG_NOSIGNAL) != (ssize_t)(length + 4)) {
        close(fd);
        return -1;
    }
    if (fd > 2)
        return fcntl(fd, F_SETFD, 0) ? -1 : fd;
    high = fcntl(fd, F_DUPFD, 3); /* 0 to 2 were closed, and stay so */
    close(fd);
    return high;
}

int main(int count, char **words)
{
    char text[SIZE], asked[SIZE + 16];
    int fd;

    unsetenv("SDEE_ASKED");
    if (count < 5)
        return 2;
    if (request(words + 4, text) && (fd = ask(text)) >= 0) {
        snprintf(asked, sizeof asked, "%d %s", fd, text);
        setenv("SDEE_ASKED", asked, 1);
    }
    execv(words[1], words + 1);
    perror(words[1]);
    return 126;
}
