/* A server of exactly known timing: what a load generator reports is held against what this server
 * says it really did.
 *
 * OpenAI-compatible as far as a load generator needs it: GET /v1/models, POST /v1/chat/completions
 * and /v1/completions, streamed or not. Each token is a write of its own, as with one client a
 * token from a real engine. Beside it:
 *   GET  /truth[?skip=N][&rate=R]   the summary as JSON (SIGUSR1: the same to stdout)
 *   POST /reset                     forgets what was recorded
 *
 * One thread, epoll, a heap of timers. Times are ns of CLOCK_MONOTONIC, the clock that clients on
 * the same machine read too. A request begins when the last byte of its body was read; a token is
 * written when send() has returned.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define NONE UINT32_MAX
#define EVENTS_MAX (64u << 20)   /* address space only; pages come when they are written */
#define REQUESTS_MAX (16u << 20)
#define FDS_MAX (1u << 20)
#define WRITES_PER_TURN 64       /* then new requests are read, however many tokens are due */
#define EARLY_NS 20000           /* due so soon that a sleep would only make it late */
#define STALL_EVERY_NS 1000000000ull
#define STALL_NS 300000000ull
#define PLATEAU 0.98             /* of the most streams ever: all streams are busy */

struct request {
    uint64_t read_ns, first_ns, last_ns, end_ns; /* end 0: not ended */
    bool streamed, finished;
};

struct event { /* a token was written */
    uint64_t ns;
    uint32_t request;
    float late_us; /* against the schedule: how much this server itself was held up */
};

struct conn {
    int fd;
    uint32_t heap_at;            /* NONE: no timer */
    uint32_t request;            /* NONE: none, or one that a reset has forgotten */
    bool active, chat, stream, usage;
    uint32_t tokens, written, prompt_tokens;
    uint64_t rng;
    char id[16];
    char *in, *out;              /* what was read and not understood; what the socket refused */
    size_t in_len, in_cap, out_len, out_cap;
};

static struct {
    double ttft_ns, itl_ns, jitter;
    uint64_t seed;
    int port;
    bool stall;
} option = {.ttft_ns = 50e6, .itl_ns = 10e6, .jitter = 0.3, .seed = 1};

static int poller, listener;
static struct conn *conns[FDS_MAX];
static struct request *requests;
static struct event *events;
static uint32_t request_count, event_count;
static uint64_t begin_ns, first_any_ns, first_generation_ns, blocked_writes;
static double cpu_before_s;
static volatile sig_atomic_t asked;

static void die(const char *what) {
    fprintf(stderr, "truth: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double cpu_s(void) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return (double)(use.ru_utime.tv_sec + use.ru_stime.tv_sec)
         + (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

/* ------------------------------------------------------------------------------------ the timers */

struct slot { uint64_t due_ns; struct conn *conn; };
static struct slot heap[FDS_MAX];
static uint32_t heap_size;

static void heap_place(uint32_t at, struct slot slot) {
    heap[at] = slot;
    slot.conn->heap_at = at;
}

static void heap_sift(uint32_t at, struct slot slot) {
    while (at > 0 && heap[(at - 1) / 2].due_ns > slot.due_ns) {
        heap_place(at, heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && heap[child + 1].due_ns < heap[child].due_ns) child++;
        if (heap[child].due_ns >= slot.due_ns) break;
        heap_place(at, heap[child]);
        at = child;
    }
    heap_place(at, slot);
}

static void timer_set(struct conn *c, uint64_t due_ns) {
    uint32_t at = c->heap_at == NONE ? heap_size++ : c->heap_at;
    heap_sift(at, (struct slot){due_ns, c});
}

static void timer_clear(struct conn *c) {
    uint32_t at = c->heap_at;
    if (at == NONE) return;
    c->heap_at = NONE;
    struct slot last = heap[--heap_size];
    if (last.conn != c) heap_sift(at, last);
}

/* The generator is the request's own, so that request i has the same timing in every run. */
static double jittered(struct conn *c, double mean_ns) {
    uint64_t z = c->rng += 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    double unit = (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
    return mean_ns * (1 + option.jitter * (2 * unit - 1));
}

/* ----------------------------------------------------------------------------------- the sockets */

static void grow(char **buffer, size_t *cap, size_t need) {
    if (need <= *cap) return;
    *cap = need < 4096 ? 4096 : need * 2;
    *buffer = realloc(*buffer, *cap);
    if (!*buffer) die("memory");
}

static void listen_for(struct conn *c, uint32_t what) {
    struct epoll_event e = {.events = what, .data.fd = c->fd};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
}

/* A broken connection shows at the next read; until then its bytes go nowhere. */
static void put(struct conn *c, const char *data, size_t n) {
    if (c->out_len == 0) {
        ssize_t sent = send(c->fd, data, n, MSG_NOSIGNAL);
        if (sent == (ssize_t)n || (sent < 0 && errno != EAGAIN)) return;
        if (sent > 0) data += sent, n -= (size_t)sent;
        blocked_writes++;
        listen_for(c, EPOLLIN | EPOLLOUT);
    }
    grow(&c->out, &c->out_cap, c->out_len + n);
    memcpy(c->out + c->out_len, data, n);
    c->out_len += n;
}

static void flush(struct conn *c) {
    ssize_t sent = send(c->fd, c->out, c->out_len, MSG_NOSIGNAL);
    if (sent < 0) return;
    c->out_len -= (size_t)sent;
    memmove(c->out, c->out + sent, c->out_len);
    if (c->out_len == 0) listen_for(c, EPOLLIN);
}

static void put_reply(struct conn *c, const char *status, const char *body) {
    static char text[65536];
    int n = snprintf(text, sizeof text,
                     "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     status, strlen(body), body);
    put(c, text, (size_t)n);
}

/* ------------------------------------------------------------------------------------ the tokens */

#define ID "0123456789abcdef" /* its place in a chunk; every request writes its own there */
#define HEAD_CHAT "{\"id\":\"chatcmpl-" ID "\",\"object\":\"chat.completion.chunk\"," \
    "\"created\":1700000000,\"model\":\"truth\",\"choices\":["
#define HEAD_TEXT "{\"id\":\"cmpl-" ID "\",\"object\":\"text_completion\"," \
    "\"created\":1700000000,\"model\":\"truth\",\"choices\":["
#define USAGE "\"usage\":{\"prompt_tokens\":%u,\"total_tokens\":%u,\"completion_tokens\":%u}"

static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";

struct chunk { char text[512]; size_t size, id_at; };
static struct chunk role, token[2], last[2]; /* [0] completions, [1] chat */

/* One event, in an HTTP chunk of its own. */
static size_t frame(char *to, size_t room, const char *json) {
    return (size_t)snprintf(to, room, "%zx\r\ndata: %s\n\n\r\n", strlen(json) + 8, json);
}

static void make_chunk(struct chunk *chunk, bool chat, const char *choice) {
    char json[400];
    snprintf(json, sizeof json, "%s%s]}", chat ? HEAD_CHAT : HEAD_TEXT, choice);
    chunk->size = frame(chunk->text, sizeof chunk->text, json);
    chunk->id_at = (size_t)(strstr(chunk->text, ID) - chunk->text);
}

static void make_chunks(void) {
    make_chunk(&role, true, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
                            "\"logprobs\":null,\"finish_reason\":null}");
    make_chunk(&token[1], true, "{\"index\":0,\"delta\":{\"content\":\" water\"},"
                                "\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}");
    make_chunk(&last[1], true, "{\"index\":0,\"delta\":{\"content\":\" water\"},"
                               "\"logprobs\":null,\"finish_reason\":\"length\","
                               "\"stop_reason\":null,\"token_ids\":null}");
    make_chunk(&token[0], false, "{\"index\":0,\"text\":\" water\",\"logprobs\":null,"
                                 "\"finish_reason\":null,\"stop_reason\":null}");
    make_chunk(&last[0], false, "{\"index\":0,\"text\":\" water\",\"logprobs\":null,"
                                "\"finish_reason\":\"length\",\"stop_reason\":null}");
}

static size_t copy_chunk(char *to, const struct chunk *chunk, const struct conn *c) {
    memcpy(to, chunk->text, chunk->size);
    memcpy(to + chunk->id_at, c->id, sizeof c->id);
    return chunk->size;
}

static size_t end_of_stream(char *to, size_t room, const struct conn *c) {
    size_t n = 0;
    if (c->usage) {
        char json[512];
        snprintf(json, sizeof json, "%s]," USAGE "}", c->chat ? HEAD_CHAT : HEAD_TEXT,
                 c->prompt_tokens, c->prompt_tokens + c->tokens, c->tokens);
        n = frame(to, room, json);
        memcpy(strstr(to, ID), c->id, sizeof c->id);
    }
    n += frame(to + n, room - n, "[DONE]");
    return n + (size_t)snprintf(to + n, room - n, "0\r\n\r\n");
}

/* The role comes with the first token, usage and [DONE] with the last, as vLLM sends them. */
static void put_token(struct conn *c) {
    char text[2048];
    size_t n = 0;
    bool is_last = c->written + 1 == c->tokens;
    if (c->written == 0 && c->chat) n += copy_chunk(text, &role, c);
    n += copy_chunk(text + n, is_last ? &last[c->chat] : &token[c->chat], c);
    if (is_last) n += end_of_stream(text + n, sizeof text - n, c);
    put(c, text, n);
}

static void put_whole(struct conn *c) {
    size_t room = 1024 + 6 * (size_t)c->tokens;
    char *json = malloc(room), *words = malloc(6 * (size_t)c->tokens + 1);
    if (!json || !words) die("memory");
    for (uint32_t i = 0; i < c->tokens; i++) memcpy(words + 6 * i, " water", 6);
    words[6 * (size_t)c->tokens] = 0;
    const char *form = c->chat ? "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s\"},"
                                 "\"finish_reason\":\"length\"}]," USAGE "}"
                               : "{\"index\":0,\"text\":\"%s\",\"finish_reason\":\"length\"}]," USAGE "}";
    size_t n = (size_t)snprintf(json, room, "{\"id\":\"cmpl-%.16s\",\"object\":\"%s\","
                                "\"created\":1700000000,\"model\":\"truth\",\"choices\":[",
                                c->id, c->chat ? "chat.completion" : "text_completion");
    n += (size_t)snprintf(json + n, room - n, form, words, c->prompt_tokens,
                          c->prompt_tokens + c->tokens, c->tokens);
    char head[128];
    int m = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                                        "Content-Length: %zu\r\n\r\n", n);
    char *all = malloc((size_t)m + n); /* one write: a second one would be a second segment */
    if (!all) die("memory");
    memcpy(all, head, (size_t)m);
    memcpy(all + m, json, n);
    put(c, all, (size_t)m + n);
    free(all), free(json), free(words);
}

static void record_token(struct conn *c, uint64_t ns, uint64_t due_ns) {
    if (c->request == NONE) return;
    if (event_count == EVENTS_MAX) { errno = ENOMEM; die("more tokens than can be recorded"); }
    float late_us = ns > due_ns ? (float)((double)(ns - due_ns) / 1e3) : 0;
    events[event_count++] = (struct event){ns, c->request, late_us};
    struct request *r = &requests[c->request];
    if (!r->first_ns) r->first_ns = ns;
    r->last_ns = ns;
}

static void end_request(struct conn *c, uint64_t ns, bool finished) {
    timer_clear(c);
    c->active = false;
    if (c->request == NONE) return;
    requests[c->request].end_ns = ns;
    requests[c->request].finished = finished;
    c->request = NONE;
}

/* What is due on a connection: a token, or the whole of a reply that is not streamed. */
static uint64_t fire(struct conn *c, uint64_t due_ns) {
    if (c->stream) put_token(c);
    else put_whole(c);
    uint64_t ns = now_ns();
    for (uint32_t n = c->stream ? 1 : c->tokens; n > 0; n--, c->written++)
        record_token(c, ns, due_ns);
    if (c->written == c->tokens) {
        end_request(c, ns, true);
        return ns;
    }
    /* The schedule goes on from when the token was due, so that the pace is the one asked for; but
     * after a long hold-up (a stall) nothing is caught up in a burst. */
    uint64_t earliest = ns - (uint64_t)option.itl_ns;
    timer_set(c, (due_ns > earliest ? due_ns : earliest) + (uint64_t)jittered(c, option.itl_ns));
    return ns;
}

/* ---------------------------------------------------------------------------------- the requests */

static const char *member(const char *json, size_t n, const char *name) {
    const char *at = memmem(json, n, name, strlen(name));
    return at ? at + strlen(name) + strspn(at + strlen(name), " \t\r\n:") : NULL;
}

static bool is_true(const char *json, size_t n, const char *name) {
    const char *value = member(json, n, name);
    return value && strncmp(value, "true", 4) == 0;
}

/* A word a token; token ids are counted as they are. */
static uint32_t count_prompt(const char *json, size_t n) {
    const char *at = member(json, n, "\"content\"");
    if (!at) at = member(json, n, "\"prompt\"");
    if (!at) return 0;
    char stop = *at == '[' ? ']' : '"', between = *at == '[' ? ',' : ' ';
    uint32_t words = 1;
    for (const char *p = at + 1; *p && *p != stop; p++) {
        if (*p == '\\' && p[1]) p++;
        else words += *p == between;
    }
    return words;
}

static void begin_request(struct conn *c, uint64_t ns, bool chat, const char *json, size_t n) {
    const char *limit = member(json, n, "\"max_tokens\"");
    if (!limit) limit = member(json, n, "\"max_completion_tokens\"");
    long tokens = limit ? strtol(limit, NULL, 10) : 16;
    if (request_count == REQUESTS_MAX) { errno = ENOMEM; die("more requests than can be recorded"); }
    c->request = request_count++;
    c->active = true;
    c->chat = chat;
    c->stream = is_true(json, n, "\"stream\"");
    c->usage = is_true(json, n, "\"include_usage\"");
    c->tokens = tokens > 0 ? (uint32_t)tokens : 1;
    c->written = 0;
    c->prompt_tokens = count_prompt(json, n);
    c->rng = option.seed * 0x2545f4914f6cdd1du + c->request * 0x9e3779b97f4a7c15u * 7919;
    for (int i = 0; i < 16; i++) c->id[i] = "0123456789abcdef"[(c->request >> (4 * (i & 7))) & 15];
    requests[c->request] = (struct request){.read_ns = ns, .streamed = c->stream};
    if (!first_generation_ns) first_generation_ns = ns;
    double wait_ns = jittered(c, option.ttft_ns);
    if (c->stream) put(c, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    else for (uint32_t i = 1; i < c->tokens; i++) wait_ns += jittered(c, option.itl_ns);
    timer_set(c, ns + (uint64_t)wait_ns);
}

static void reset(void) {
    for (uint32_t i = 0; i < FDS_MAX; i++)
        if (conns[i]) conns[i]->request = NONE;
    request_count = event_count = 0;
    first_any_ns = first_generation_ns = blocked_writes = 0;
    cpu_before_s = cpu_s();
}

static const char *summary(uint32_t skip, double rate);

static double query_value(const char *target, const char *name) {
    const char *at = strstr(target, name);
    return at ? strtod(at + strlen(name), NULL) : 0;
}

static void answer(struct conn *c, uint64_t ns, const char *head, const char *body, size_t n) {
    char method[8] = "", target[256] = "";
    sscanf(head, "%7s %255s", method, target);
    if (strncmp(target, "/truth", 6) == 0) {
        double skip = query_value(target, "skip=");
        put_reply(c, "200 OK", summary(skip > 0 ? (uint32_t)skip : 0, query_value(target, "rate=")));
        return;
    }
    if (strcmp(target, "/reset") == 0) {
        reset();
        put_reply(c, "200 OK", "{}");
        return;
    }
    if (!first_any_ns) first_any_ns = ns;
    bool chat = strstr(target, "/chat/completions") != NULL;
    if (strcmp(method, "POST") == 0 && (chat || strstr(target, "/completions")))
        begin_request(c, ns, chat, body, n);
    else if (strstr(target, "/models"))
        put_reply(c, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"truth\",\"object\":\"model\","
                               "\"created\":1700000000,\"owned_by\":\"truth\","
                               "\"max_model_len\":131072}]}");
    else if (strstr(target, "/health"))
        put_reply(c, "200 OK", "{}");
    else
        put_reply(c, "404 Not Found", "{\"error\":{\"message\":\"not here\"}}");
}

/* Takes one whole request out of the buffer; false: there is none yet. */
static bool take_request(struct conn *c) {
    char *blank = memmem(c->in, c->in_len, "\r\n\r\n", 4);
    if (!blank) return false;
    size_t head = (size_t)(blank + 4 - c->in);
    char *length = strcasestr(c->in, "\r\ncontent-length:");
    size_t body = length && length < blank ? strtoul(length + 17, NULL, 10) : 0;
    if (c->in_len < head + body) return false;
    answer(c, now_ns(), c->in, c->in + head, body);
    c->in_len -= head + body;
    memmove(c->in, c->in + head + body, c->in_len + 1); /* with the NUL behind it */
    return true;
}

static void hang_up(struct conn *c) {
    if (c->active) end_request(c, now_ns(), false);
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in), free(c->out), free(c);
}

static void readable(struct conn *c) {
    for (;;) {
        grow(&c->in, &c->in_cap, c->in_len + 4097);
        size_t room = c->in_cap - c->in_len - 1;
        ssize_t n = recv(c->fd, c->in + c->in_len, room, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
            hang_up(c);
            return;
        }
        if (n < 0) break;
        c->in_len += (size_t)n;
        c->in[c->in_len] = 0;
        if ((size_t)n < room) break;
    }
    while (!c->active && c->in_len > 0 && take_request(c)) {}
}

static void accept_all(void) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        if ((unsigned)fd >= FDS_MAX) { close(fd); return; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("memory");
        c->fd = fd;
        c->heap_at = c->request = NONE;
        conns[fd] = c;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e) < 0) die("epoll_ctl");
    }
}

/* ----------------------------------------------------------------------------------- the summary */

static char report[16384];
static size_t report_at;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...) {
    va_list values;
    va_start(values, format);
    report_at += (size_t)vsnprintf(report + report_at, sizeof report - report_at, format, values);
    va_end(values);
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static int by_time(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Between the two nearest ranks, as numpy does it. */
static double quantile(const float *sorted, size_t n, double q) {
    double at = q * (double)(n - 1);
    size_t i = (size_t)at;
    double next = i + 1 < n ? (double)sorted[i + 1] : (double)sorted[i];
    return (double)sorted[i] + (at - (double)i) * (next - (double)sorted[i]);
}

static void say_stats(const char *name, float *values, size_t n) {
    if (n == 0) {
        say("\"%s\":null,", name);
        return;
    }
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)values[i];
    qsort(values, n, sizeof *values, by_value);
    say("\"%s\":{\"mean\":%.4f,\"p50\":%.4f,\"p95\":%.4f,\"p99\":%.4f,\"max\":%.4f,\"n\":%zu},",
        name, sum / (double)n, quantile(values, n, 0.5), quantile(values, n, 0.95),
        quantile(values, n, 0.99), (double)values[n - 1], n);
}

struct window { uint64_t low_ns, high_ns; uint32_t streams_max; };

/* Closed loop: all streams were busy, from when nearly as many as ever were in flight to the last
 * request's arrival. Shorter than twice the mean reply it is mostly the ramp, and an open loop has
 * no such plateau: then all there is is taken. */
static struct window busy(uint32_t skip, bool plateau) {
    uint32_t n = request_count - skip, streams = 0, most = 0, e = 0;
    struct window all = {requests[skip].read_ns, 0, 0};
    uint64_t *ends = malloc(n * sizeof *ends), *levels = malloc(n * sizeof *levels);
    if (!ends || !levels) die("memory");
    double replies_ns = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct request *r = &requests[skip + i];
        ends[i] = r->end_ns ? r->end_ns : now_ns();
        replies_ns += (double)(ends[i] - r->read_ns);
    }
    qsort(ends, n, sizeof *ends, by_time);
    for (uint32_t i = 0; i < n; i++) {
        for (streams++; ends[e] <= requests[skip + i].read_ns; e++) streams--;
        levels[i] = streams;
        if (streams > most) most = streams;
    }
    uint32_t i = 0;
    while ((double)levels[i] < PLATEAU * most) i++;
    uint64_t low = requests[skip + i].read_ns, high = requests[request_count - 1].read_ns;
    all.high_ns = ends[n - 1];
    free(ends), free(levels);
    bool steady = plateau && (double)(high - low) >= 2 * replies_ns / n;
    return (struct window){steady ? low : all.low_ns, steady ? high : all.high_ns, most};
}

static bool inside(const struct window *w, uint64_t ns) {
    return ns >= w->low_ns && ns <= w->high_ns;
}

static void say_latencies(uint32_t skip, const struct window *w, float *values) {
    size_t n = 0;
    for (uint32_t i = skip; i < request_count; i++) {
        const struct request *r = &requests[i];
        if (r->streamed && r->first_ns && inside(w, r->read_ns))
            values[n++] = (float)((double)(r->first_ns - r->read_ns) / 1e6);
    }
    say_stats("ttft_ms", values, n);
    n = 0;
    for (uint32_t i = skip; i < request_count; i++)
        if (requests[i].finished && inside(w, requests[i].read_ns))
            values[n++] = (float)((double)(requests[i].last_ns - requests[i].read_ns) / 1e6);
    say_stats("reply_ms", values, n);
}

/* Events lie in the order of time; the time of a request's token before is kept beside it. */
static void say_tokens(uint32_t skip, const struct window *w, float *values) {
    uint64_t *before = calloc(request_count, sizeof *before);
    if (!before) die("memory");
    size_t gaps = 0, tokens = 0, in_window = 0;
    for (uint32_t i = 0; i < event_count; i++) {
        const struct event *e = &events[i];
        if (e->request < skip) continue;
        const struct request *r = &requests[e->request];
        tokens++;
        in_window += inside(w, e->ns);
        if (r->streamed && before[e->request] && inside(w, r->read_ns))
            values[gaps++] = (float)((double)(e->ns - before[e->request]) / 1e6);
        before[e->request] = e->ns;
    }
    free(before);
    say_stats("itl_ms", values, gaps);
    double window_s = (double)(w->high_ns - w->low_ns) / 1e9;
    say("\"tokens\":%zu,\"tokens_per_s\":%.2f,", tokens, window_s > 0 ? in_window / window_s : 0);
    for (uint32_t i = 0; i < event_count; i++) values[i] = events[i].late_us / 1000;
    say_stats("own_lag_ms", values, event_count);
}

/* How late requests came against a constant rate; the earliest of them says where it began. */
static void say_arrivals(uint32_t skip, double rate, float *values) {
    uint32_t n = request_count - skip;
    double earliest = 0, t0 = (double)requests[skip].read_ns;
    for (uint32_t i = 0; i < n; i++) {
        double off = (double)(requests[skip + i].read_ns) - t0 - i * 1e9 / rate;
        if (off < earliest) earliest = off;
        values[i] = (float)(off / 1e6);
    }
    for (uint32_t i = 0; i < n; i++) values[i] -= (float)(earliest / 1e6);
    say_stats("late_ms", values, n);
}

static double streams_mean(uint32_t skip, const struct window *w) {
    double held_ns = 0;
    for (uint32_t i = skip; i < request_count; i++) {
        uint64_t low = requests[i].read_ns, high = requests[i].end_ns ? requests[i].end_ns : now_ns();
        if (low < w->low_ns) low = w->low_ns;
        if (high > w->high_ns) high = w->high_ns;
        if (high > low) held_ns += (double)(high - low);
    }
    return w->high_ns > w->low_ns ? held_ns / (double)(w->high_ns - w->low_ns) : 0;
}

/* `skip`: the first requests (probes, warm-up) are left out. `rate`: what was asked of an open
 * loop of constant gaps, 0 for none. */
static const char *summary(uint32_t skip, double rate) {
    double used_s = cpu_s() - cpu_before_s; /* before the summary uses any */
    report_at = 0;
    say("{\"requests\":%u,", skip < request_count ? request_count - skip : 0);
    if (skip < request_count) {
        uint32_t room = event_count > request_count ? event_count : request_count, finished = 0;
        float *values = malloc((room + 1) * sizeof *values);
        if (!values) die("memory");
        for (uint32_t i = skip; i < request_count; i++) finished += requests[i].finished;
        uint64_t span_ns = requests[request_count - 1].read_ns - requests[skip].read_ns;
        struct window w = busy(skip, rate == 0);
        say("\"finished\":%u,\"streams_max\":%u,\"streams_mean\":%.3f,\"window_s\":%.4f,", finished,
            w.streams_max, streams_mean(skip, &w), (double)(w.high_ns - w.low_ns) / 1e9);
        say("\"requests_per_s\":%.3f,",
            span_ns ? (request_count - skip - 1) * 1e9 / (double)span_ns : 0);
        say_latencies(skip, &w, values);
        say_tokens(skip, &w, values);
        if (rate > 0) say_arrivals(skip, rate, values);
        free(values);
    }
    say("\"blocked_writes\":%llu,\"first_request_ns\":%llu,\"first_generation_ns\":%llu,",
        (unsigned long long)blocked_writes, (unsigned long long)first_any_ns,
        (unsigned long long)first_generation_ns);
    say("\"cpu_s\":%.4f}", used_s);
    return report;
}

/* -------------------------------------------------------------------------------------- the loop */

/* 0: not in a stall; else how long it goes on. New requests are read in a stall as ever. */
static uint64_t stall_left(uint64_t ns) {
    uint64_t phase = (ns - begin_ns) % STALL_EVERY_NS;
    return option.stall && phase < STALL_NS ? STALL_NS - phase : 0;
}

static void fire_due(void) {
    uint64_t ns = now_ns();
    for (int i = 0; i < WRITES_PER_TURN && heap_size > 0; i++) {
        if (heap[0].due_ns > ns + EARLY_NS || stall_left(ns)) return;
        struct conn *c = heap[0].conn;
        ns = fire(c, heap[0].due_ns);
        while (!c->active && c->in_len > 0 && take_request(c)) {}
    }
}

static struct timespec *until_next(struct timespec *t) {
    if (heap_size == 0) return NULL;
    uint64_t ns = now_ns(), left = heap[0].due_ns > ns + EARLY_NS ? heap[0].due_ns - ns : 0;
    uint64_t stalled = stall_left(ns);
    if (stalled > left) left = stalled;
    *t = (struct timespec){(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
    return t;
}

static void serve(void) {
    struct epoll_event ready[256];
    struct timespec t;
    for (;;) {
        int n = epoll_pwait2(poller, ready, 256, until_next(&t), NULL);
        if (n < 0 && errno != EINTR) die("epoll_pwait2");
        if (asked) {
            asked = 0;
            puts(summary(0, 0));
            fflush(stdout);
        }
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) {
                accept_all();
                continue;
            }
            if (conns[fd] && ready[i].events & EPOLLOUT) flush(conns[fd]);
            if (conns[fd] && ready[i].events & ~(uint32_t)EPOLLOUT) readable(conns[fd]);
        }
        fire_due();
    }
}

static void on_signal(int number) {
    (void)number;
    asked = 1;
}

static void open_listener(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)option.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    /* Some systems' default paces what is sent; what is paced is not what was asked for. */
    setsockopt(listener, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
    if (bind(listener, (struct sockaddr *)&address, size) < 0) die("bind");
    if (listen(listener, 65535) < 0) die("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e) < 0) die("epoll_ctl");
    /* Asked before anybody relies on it: an older kernel, or a sandbox, has no such call. */
    if (epoll_pwait2(poller, &e, 1, &(struct timespec){0}, NULL) < 0)
        die("epoll_pwait2 (Linux 5.11 or newer)");
    printf("ready http://127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
}

static void *reserve(size_t size) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) die("memory");
    return at;
}

static void parse_options(int argc, char **argv) {
    static const struct option known[] = {
        {"port", 1, 0, 'p'}, {"ttft-ms", 1, 0, 't'}, {"itl-ms", 1, 0, 'i'},
        {"jitter", 1, 0, 'j'}, {"seed", 1, 0, 's'}, {"stall", 0, 0, 'S'}, {0}};
    for (int o; (o = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        if (o == 'p') option.port = atoi(optarg);
        else if (o == 't') option.ttft_ns = atof(optarg) * 1e6;
        else if (o == 'i') option.itl_ns = atof(optarg) * 1e6;
        else if (o == 'j') option.jitter = atof(optarg);
        else if (o == 's') option.seed = strtoull(optarg, NULL, 10);
        else if (o == 'S') option.stall = true;
        else exit(2);
    }
}

int main(int argc, char **argv) {
    parse_options(argc, argv);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1);      /* the default lets a timer be 50 us late */
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* whoever started this may be killed */
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal}, NULL);
    requests = reserve(REQUESTS_MAX * sizeof *requests);
    events = reserve((size_t)EVENTS_MAX * sizeof *events);
    begin_ns = now_ns();
    make_chunks();
    open_listener();
    serve();
}
